"""Trains the small parts that a learned method needs, on a decoder that stays as it is.

    python -m experiments.train --gin_file=configs/runs/train_matryoshka.gin --output_dir=out/matryoshka
    python -m experiments.evaluate --methods=matryoshka_pca,matryoshka_trained --output_dir=out/compared

The first command leaves in the folder: `trained`, which a method's config names as its `calibration.path`;
`metrics.jsonl` and `curves.png`; and `checkpoints`, from which `--resume` goes on after whatever stopped it, to the
same numbers on the same machine.
"""

from __future__ import annotations

from experiments import interrupts

if __name__ == "__main__":
    interrupts.quit_in_one_line()  # the imports below take seconds

import dataclasses
import functools
import inspect
import math
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import gin
import jax
import numpy as np
import optax
import tqdm
from absl import flags

from experiments import bindings, calibrations, cli, pictures
from experiments.loading import on_mesh
from experiments.optimizers import learning_rates, optimizer
from experiments.output_folder import output_folder
from experiments.recipes import Frozen, Recipe
from experiments.report import human_bytes
from experiments.training_folder import TrainingFolder
from experiments.training_text import Batch, Batches, TrainingText
from kvjax import nbytes, sharding
from models import Model

_STEPS = flags.DEFINE_integer("steps", None, "Training steps.")
_RESUME = flags.DEFINE_bool("resume", False, "Go on from the last complete checkpoint in output_dir.")
for _name in ("gin_file", "gin_bindings", "model", "output_dir", "replace"):
    flags.declare_key_flag(_name)


@gin.configurable(module="experiments")
@dataclasses.dataclass(frozen=True)
class Training:
    """What a training does; gin binds it as `Training`, flags win.

    Attributes:
      recipe: of `experiments.recipes`.
      model: see `models.load_model`.
      dtype: of the frozen weights and of what they compute; what is trained is always float32.
      steps: of training.
      rows: examples of a batch.
      text: where they come from.
      optimizer: `(steps) -> optax chain`.
      seed: of everything that is drawn.
      validate_every: steps between two validations, each followed by a checkpoint.
      validation_batches: the same ones every time.
      keep: best checkpoints that are kept beside the last one.
      mesh: named axes and sizes such as "data:4,model:2", see `kvjax.sharding.make_mesh`: rows are split over "data",
        weights over "model"; what is trained is on every device. None: one device.
    """

    recipe: Recipe = gin.REQUIRED
    model: str = "smollm2"
    dtype: str = "float32"
    steps: int = 200
    rows: int = 1
    text: TrainingText = dataclasses.field(default_factory=lambda: TrainingText())  # with its bindings
    optimizer: Callable[[int], optax.GradientTransformation] = optimizer
    seed: int = 0
    validate_every: int = 50
    validation_batches: int = 8
    keep: int = 2
    mesh: str | None = None

    def __post_init__(self):
        for name in ("steps", "rows", "validate_every", "validation_batches", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"Training.{name} must be at least 1, got {getattr(self, name)}.")


class State(NamedTuple):
    """What a checkpoint holds beside its step, which gives the batches and the random numbers to come."""

    trained: Any
    optimizer: Any
    constants: Any


class Trainer:
    """A training as pure functions of the state and of the step's number.

    Attributes:
      text: the fingerprint of what is read.
    """

    jit = staticmethod(jax.jit)  # may be replaced by one that compiles faster

    def __init__(self, training: Training, model: Model):
        if model.config.local_layers:
            raise ValueError(
                f"--model: some layers of {model.config.name} have a sliding window; recipes train decoders whose "
                "layers all see the whole context."
            )
        if model.config.latent_rank:
            raise ValueError(
                f"--model: in the multi-head latent attention of {model.config.name} the keys are the values; recipes "
                "train decoders that keep them apart."
            )
        self._training, self._model = training, model
        self._batches = Batches(training.text, model, training.seed)
        self.text = self._batches.fingerprint
        self._chain = training.optimizer(training.steps)
        self.compiled = self.jit(self._update, donate_argnums=(0, 1))
        self._score = self.jit(
            lambda trained, frozen, batch, key: training.recipe.loss(
                model.config, trained, frozen, _over_rows(batch), key
            )[0]
        )

    def start(self) -> State:
        """The state before the first step."""
        trained, constants = self._training.recipe.start(self._model)
        return sharding.on_every_device(State(trained, self._chain.init(trained), constants))

    def step(self, state: State, number: int) -> tuple[State, dict[str, float]]:
        """Step `number`, from 0; its metrics, `loss` among them. The state is donated."""
        batch = self._batches.training(number, self._training.rows)
        frozen = Frozen(self._model.params, state.constants)
        trained, opt, metrics = self.compiled(state.trained, state.optimizer, frozen, batch, number)
        return State(trained, opt, state.constants), {name: float(x) for name, x in metrics.items()}

    def validation_loss(self, state: State) -> float:
        """The mean loss over batches, with random numbers, that are the same at every call."""
        frozen, losses = Frozen(self._model.params, state.constants), []
        for number in range(self._training.validation_batches):
            batch = self._batches.validation(number, self._training.rows)
            losses.append(self._score(state.trained, frozen, batch, self._key(1, number)))
        return float(np.mean([float(x) for x in losses]))

    def _update(self, trained, opt, frozen: Frozen, batch: Batch, number: jax.Array):
        recipe, batch = self._training.recipe, _over_rows(batch)
        of_trained = lambda trained: recipe.loss(self._model.config, trained, frozen, batch, self._key(0, number))
        (loss, metrics), gradients = jax.value_and_grad(of_trained, has_aux=True)(trained)
        updates, opt = self._chain.update(gradients, opt, trained)
        trained = recipe.constrain(optax.apply_updates(trained, updates))
        return trained, opt, {"loss": loss, **metrics, "gradient": optax.tree.norm(gradients)}

    def _key(self, use: int, number: jax.Array | int) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(self._training.seed), use), number)


def _over_rows(batch: Batch) -> Batch:
    """The batch with its rows split over the mesh, if there is one."""
    return jax.tree.map(lambda x: sharding.constrain(x, "batch"), batch)


def train(trainer: Trainer, training: Training, folder: TrainingFolder) -> State:
    """Runs the steps that are missing, and returns the best state.

    Raises:
      ValueError: a loss is not finite.
    """
    state = trainer.start()
    if folder.step:
        state = State(*_as(state, folder.load(folder.step, state)))
    else:
        first = trainer.validation_loss(state)
        if not math.isfinite(first):
            raise ValueError(f"the loss before training is {first}: the model's weights or activations are not finite.")
        folder.log({"step": 0, "validation": first})
    with tqdm.tqdm(total=training.steps, initial=folder.step, unit="step", smoothing=0.1) as bar:
        for number in range(folder.step, training.steps):
            started = time.perf_counter()
            state, metrics = trainer.step(state, number)
            if not math.isfinite(metrics["loss"]):
                raise ValueError(
                    f"the loss of step {number + 1} is {metrics['loss']}; lower optimizer.learning_rate, or raise "
                    "optimizer.warmup."
                )
            row = {"step": number + 1, **metrics, "seconds": round(time.perf_counter() - started, 3)}
            done = number + 1
            if done % training.validate_every == 0 or done == training.steps:
                row["validation"] = trainer.validation_loss(state)
                folder.log(row)
                folder.save(done, state, row["validation"])
            else:
                folder.log(row)
            shown = " ".join(f"{name} {row[name]:.4f}" for name in ("loss", "validation") if name in row)
            bar.set_postfix_str(shown, refresh=False)
            bar.update()
    return State(*_as(state, folder.load(folder.best_step(), state)))


def _as(like: State, loaded: Any) -> Any:
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(loaded))


def check_steps(training: Training, before: int, done: int) -> None:
    """Refuses to go on with other steps where the learning rate would jump; otherwise says what changes.

    Args:
      training: with the new steps.
      before: steps of the schedule so far.
      done: steps that are done.

    Raises:
      ValueError: there are more done already, or the two schedules differ at the next step.
    """
    if training.steps < done:
        raise ValueError(f"--steps: {done} steps are done already, got {training.steps}.")
    names = inspect.signature(learning_rates).parameters
    bound = {name: value for name, value in gin.get_bindings("optimizer").items() if name in names}
    accumulate = bound.get("accumulate", 1)
    was, now = (float(learning_rates(steps, **bound)(done // accumulate)) for steps in (before, training.steps))
    if not math.isclose(was, now, rel_tol=1e-5):
        raise ValueError(
            f"--steps: the learning rate is {was:.3g} after {done} of {before} steps, and would jump to {now:.3g} with "
            f"{training.steps}; resume with --steps={before}, or start anew with --replace."
        )
    end = float(learning_rates(training.steps, **bound)(-(-training.steps // accumulate)))
    print(
        f"--resume: {training.steps} steps instead of {before}: the learning rate goes from {now:.3g} at step {done} "
        f"to {end:.3g} at step {training.steps}; what is done stays as it is.",
        file=sys.stderr,
    )


def read_training() -> tuple[Training, str]:
    """The settings of the gin files, the bindings and the flags, in that order, and as gin writes them."""
    cli.read_gin()
    for name, flag in (("steps", _STEPS), ("model", cli.MODEL)):
        if flag.value is not None:
            with gin.unlock_config():
                gin.bind_parameter(f"Training.{name}", flag.value)
    try:
        training = Training()
        training.optimizer(training.steps)  # refuses bad settings, and shows gin what it uses
    except (TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{', '.join(cli.gin_files())}: {bindings.explained(error)}") from error
    return training, gin.operative_config_str()


def run() -> None:
    """The program."""
    if not cli.GIN_FILE.value:
        raise ValueError("--gin_file says what is trained; there are configs/runs/train_*.gin.")
    _, config = read_training()
    cli.check_reached([config])
    training, config = read_training()  # gin forgot it meanwhile
    with on_mesh(training.mesh) as load:
        path = output_folder("training", fill=_RESUME.value)
        _run(training, config, path, load(training.model, training.dtype))


def _without_steps(config: str) -> str:
    return "".join(line for line in config.splitlines(keepends=True) if not line.startswith("Training.steps = "))


def _run(training: Training, config: str, path: pathlib.Path, model: Model) -> None:
    about = {"configuration": _without_steps(config), "steps": training.steps}
    about["model"] = f"{model.config.name}, fingerprint {calibrations.fingerprint(model)}"
    trainer = Trainer(training, model)
    about["text"] = f"{training.text.file or 'the essays'}, fingerprint {trainer.text}"
    may_change = {"steps": functools.partial(check_steps, training)}
    with TrainingFolder(path, about, keep=training.keep, resume=_RESUME.value, may_change=may_change) as folder:
        try:
            state = train(trainer, training, folder)
        except KeyboardInterrupt:
            cli.interrupted("the same command with --resume goes on from the last checkpoint")
        rows, best = folder.rows, folder.best_step()
        pictures.plot_training(rows, path / "curves.png")
        recipe = training.recipe
        data = recipe.finish(model, state.trained, state.constants)
        artifact = path / "trained"
        calibrations.save(artifact, recipe.method, model, data, {"step": best, "configuration": config})
    seconds = sum(row.get("seconds", 0.0) for row in rows)
    validation = {row["step"]: row["validation"] for row in rows if "validation" in row}
    print(
        f"{recipe.method} of {model.config.name}: {training.steps} steps in {seconds:.0f} s, validation loss "
        f"{validation[0]:.4f} before, best {validation[best]:.4f} at step {best}; "
        f"{human_bytes(nbytes(dict(data)))} in {artifact}"
    )


if __name__ == "__main__":
    cli.start(run)
