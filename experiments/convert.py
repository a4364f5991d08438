"""Writes a model as an orbax checkpoint, which loads without conversion: `--model=FOLDER` in every program.

    python -m experiments.convert --model=gemma3-270m --dtype=bfloat16 --output_dir=out/gemma3

GGUF tensors are dequantized and tensors of a family brought to this decoder's layout once, instead of at every start.
"""

from __future__ import annotations

from experiments import interrupts

if __name__ == "__main__":
    interrupts.quit_in_one_line()  # the imports below take seconds

from absl import flags

from experiments import cli
from experiments.output_folder import output_folder
from experiments.report import human_bytes
from kvjax import nbytes
from models import load_model
from models.checkpoint import save_checkpoint

_INT8 = flags.DEFINE_bool("int8", False, "Store the matrices of the layers in 8 bits.")
for _name in ("model", "dtype", "output_dir", "replace"):
    flags.declare_key_flag(_name)


def run() -> None:
    """The program."""
    folder, dtype = output_folder("checkpoint"), cli.DTYPE.value or "float32"
    model = load_model(cli.MODEL.value or "smollm2", dtype, int8=_INT8.value)
    save_checkpoint(folder, model.config, model.params, model.tokenizer)
    kind = f"{dtype}, matrices in 8 bits" if _INT8.value else dtype
    print(f"{model.config.name} as {kind}: {human_bytes(nbytes(model.params))} in {folder}")


if __name__ == "__main__":
    cli.start(run)
