"""The program that compares shared rows with padding."""

import pytest

from experiments import prepacking as program
from tests.experiments import in_process


@pytest.mark.slow  # compiles two prefills
def test_program_counts_the_tokens_of_both(checkpoint):
    code, out, err = in_process.call(program, f"--model={checkpoint}", "--batch_prompts=4", "--longest=30")
    assert code == 0, err
    lengths = program.drawn_lengths(4, 30)
    assert f"4 prompts of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all" in out
    assert f"padded       4 {4 * max(lengths):17d}" in out and "packed" in out
    assert float(out.split("logits differ by ")[1].split()[0]) < 1e-4


def test_impossible_numbers_are_refused(checkpoint):
    code, _, err = in_process.call(program, f"--model={checkpoint}", "--longest=1")
    assert code == 2 and "--longest at least 2" in err
