"""The plan: its arithmetic, what it reads from compiled programs, and the program itself."""

import json

import pytest

from experiments import plan, planner, shapes
from experiments.planner import Plan, Program, collectives, largest_context, memory_wanted
from tests.experiments import in_process

HLO = """
  %a = bf16[1,1,4096]{2,1,0} all-reduce(%x), replica_groups={}
  %b = (f32[1,4]{1,0}, f32[1,4,128]{2,1,0}) all-reduce(%x, %y), replica_groups={}
  %c = (s32[8]{0}, s32[64]{0}) all-gather-start(%x), dimensions={0}
  %d = s32[64]{0} all-gather-done(%c)
  %e = (s32[4,2]{1,0}, s32[4,2]{1,0}, u32[], u32[]) collective-permute-start(%x)
  %f = s4[16]{0} all-gather(%x)
"""


def test_collectives_are_counted_with_the_bytes_of_their_results():
    found = collectives(HLO)
    assert found == {
        "all-gather": (2, 64 * 4 + 8),
        "all-reduce": (2, 4096 * 2 + 4 * 4 + 4 * 128 * 4),
        "collective-permute": (1, 32),
    }


def test_memory_a_compiler_wanted_is_read_from_its_error():
    error = "RESOURCE_EXHAUSTED: XLA:TPU: Ran out of memory in memory space hbm. Used 18.25G of 15.75G hbm. Exceeded"
    assert memory_wanted(error) == int(18.25 * 2**30)
    assert memory_wanted("INTERNAL: something else") is None


@pytest.mark.parametrize("capacity, tokens", [(1000 * 2**20, 113_920), (150 * 2**20, 5_120), (90 * 2**20, 0)])
def test_the_largest_context_is_where_bytes_end(capacity, tokens):
    mib = 2**20
    program = lambda beside: Program(110 * mib, beside, 0, 1.0, {})
    cache = lambda n: 10 * mib + n * 6 * 1024  # 6 KiB a token; beside: 2 MiB at 1,024 tokens
    found = Plan("m", 100 * mib, cache(1024), 0, 0.0, program(0), program(cache(1024) - 10 * mib + 2 * mib))
    got = largest_context(found, 1024, capacity, cache)
    assert got == pytest.approx(tokens, rel=0.02)
    if got:
        assert 100 * mib + cache(got) + 2 * mib * got / 1024 <= capacity


def test_models_are_names_or_paths(tmp_path):
    config = shapes.read_model("llama3_1_8b", 1024)
    assert (config.num_layers, config.num_kv_heads, config.head_dim) == (32, 8, 128)
    fields = json.loads((shapes.MODELS_DIR / "qwen3_8b.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 3}))
    assert shapes.read_model(str(tmp_path), 1024).num_layers == 3
    for name in shapes.model_names():
        assert shapes.read_model(name, 4096).num_layers > 20


def test_bad_input_is_one_line_that_names_the_flag(tmp_path):
    model = "--model=llama3_1_8b"
    for flags, wanted in (
        ([], "--model says which shape: one of gemma3_27b"),
        (["--model=llama9"], "no shape 'llama9', and no path of a config.json; there are gemma3_27b"),
        ([model, "--topology=v9:2x2"], "slices are written like v5e:2x2"),
        ([model, "--topology=v5e"], "slices are written like v5e:2x2"),
        ([model, "--context=0"], "--context must be at least 1"),
        ([model, "--mesh=seq:3"], "has 3 places, but there are 4 devices"),
        ([model, "--mesh=seq=3"], "mesh must name axes"),
        ([model, "--methods=kvzip"], "needs a model's tokenizer"),
        ([model, "--tasks=x"], "--tasks means nothing"),
    ):
        code, _, err = in_process.call(plan, *flags)
        assert code == 2 and wanted in err and len(err.splitlines()) == 1, err


# One narrow layer with the heads of 8B.
NARROW = {"num_hidden_layers": 1, "vocab_size": 1024, "hidden_size": 1024, "intermediate_size": 2048, "head_dim": 128}


@pytest.mark.tpu_compile
def test_a_plan_is_printed_drawn_and_written(tmp_path):
    fields = json.loads((shapes.MODELS_DIR / "llama3_1_8b.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | NARROW))
    flags = [f"--model={tmp_path}", "--context=2048", "--topology=v5e:2x2", "--mesh=seq:2,model:2", "--methods=int4"]
    code, out, err = in_process.call(plan, *flags, f"--output_dir={tmp_path / 'out'}")
    assert code == 0, err
    written = json.loads((tmp_path / "out" / "plan.json").read_text())
    (row,) = written["methods"]
    assert (tmp_path / "out" / "plan.png").stat().st_size > 10_000
    assert "int4" in out and "yes" in out and "all-reduce" in out
    # Whole weights: 1024 x (6144 + 4096 + 3 x 2048) and two tables of 1,024 rows, over two devices, in bfloat16.
    assert row["weight_bytes"] == pytest.approx(2 * (1024 * (6144 + 4096 + 3 * 2048) + 2 * 1024 * 1024) / 2, rel=0.001)
    for program in ("decode", "prefill"):
        assert row[program]["compile_seconds"] > 0
    given = row["weight_bytes"] + row["cache_bytes"]
    assert row["decode"]["argument_bytes"] == pytest.approx(given, rel=0.05)
    assert row["fits"] and row["largest_context"] > 1_000_000 and row["bound_by"] == "bandwidth"
    assert planner.LONGEST >= row["largest_context"]
