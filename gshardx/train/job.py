"""What stays the same from step to step: the model's shape, the optimizer, and the compiled steps."""

import dataclasses
from collections.abc import Mapping
from functools import cached_property, partial

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Int

from gshardx.config import Config
from gshardx.models.build import Blueprint, Params, Variables, blueprint
from gshardx.sharding import CompiledStep, build_mesh
from gshardx.train.objective import Batch, RowScores
from gshardx.train.optimizer import build_optimizer
from gshardx.train.state import TrainState, abstract_state, init_state, whole_over_fsdp
from gshardx.train.step import StepMetrics, TrainStep, abstract_batch, compile_eval_step, compile_train_step


@dataclasses.dataclass(frozen=True)
class Job:
    """One config on one mesh; each step is compiled when first used."""

    config: Config
    mesh: Mesh
    blueprint: Blueprint
    optimizer: optax.GradientTransformation

    @classmethod
    def of(cls, config: Config, vocab: int, mesh: Mesh | None = None) -> "Job":
        """The job on ``mesh`` (default: the config's, over the devices that are here)."""
        mesh = build_mesh(config.mesh) if mesh is None else mesh
        plan = blueprint(config.model, vocab, mesh)
        if config.train.zero_stage < 3:
            plan = dataclasses.replace(plan, params=whole_over_fsdp(plan.params))
        return cls(config, mesh, plan, build_optimizer(config.optimizer, config.train.steps, plan.axes))

    @cached_property
    def split(self) -> Params:
        """Abstract parameters where the optimizer's moments are: over fsdp at every ZeRO stage."""
        if self.config.train.zero_stage == 3:
            return self.blueprint.params
        return blueprint(self.config.model, self.blueprint.vocab, self.mesh).params

    @cached_property
    def state(self) -> TrainState:
        """Abstract."""
        return abstract_state(self.blueprint, self.optimizer, self.mesh, self.split, self._averages)

    @property
    def _averages(self) -> bool:
        return self.config.optimizer.ema_decay is not None

    def init_state(self, variables: Variables | None = None) -> TrainState:
        """Step 0, with ``variables`` or new ones."""
        return init_state(
            self.blueprint, self.optimizer, self.config.seed, self.mesh, self.split, self._averages, variables
        )

    @cached_property
    def batch(self) -> Batch:
        """Abstract."""
        return abstract_batch(self.config.train.batch_size, self.config.data.sequence_length, self.mesh)

    @cached_property
    def update(self) -> TrainStep:
        """What a step computes."""
        return TrainStep(
            self.blueprint,
            self.optimizer,
            self.config.train,
            places=jax.tree.map(lambda a: a.sharding, self.split) if self.config.train.zero_stage == 2 else None,
            ema_decay=self.config.optimizer.ema_decay,
        )

    @cached_property
    def train_step(self) -> CompiledStep[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
        """Reuses (donates) the state's buffers, unless a state may have to be looked at again."""
        return compile_train_step(self.update, self.state, self.batch, self.mesh, donate=not self.config.debug.nans)

    @cached_property
    def eval_step(self) -> CompiledStep[[Variables, Batch], RowScores]:
        return compile_eval_step(self.blueprint, self.batch, self.mesh)

    @cached_property
    def rows(self) -> Int[np.ndarray, "rows"]:
        """Rows of a batch that this process's devices hold, ascending."""
        held = self.batch.tokens.sharding.addressable_devices_indices_map(self.batch.tokens.shape)
        every = np.arange(self.batch.tokens.shape[0])
        return np.unique(np.concatenate([every[index[0]] for index in held.values() if index is not None]))

    def evaluated(self, state: TrainState) -> Variables:
        """What evaluation and generation use of ``state``: the averaged weights where the run has them."""
        if not self._averages:
            return state.variables
        if self.config.train.zero_stage == 3:
            return Variables(state.ema, state.router)
        # Waited for: two programs in flight can starve each other on simulated devices.
        return Variables(jax.block_until_ready(self._place_average(state.ema)), state.router)

    @cached_property
    def _place_average(self) -> CompiledStep[[Params], Params]:
        """Brings the average, which lies with the moments, to where ZeRO 1 and 2 have the parameters."""

        def average(ema: Params) -> Params:
            return ema

        shardings = jax.tree.map(lambda a: a.sharding, self.blueprint.params)
        return CompiledStep(average, (self.state.ema,), self.mesh, out_shardings=shardings)

    def to_device(self, rows: Mapping[str, np.ndarray]) -> Batch:
        """A batch laid over the mesh; every process hands over its :attr:`rows`."""

        def part(name: str, index: tuple[slice, ...]) -> np.ndarray:
            # A device's rows are neighbours, and all of them are here.
            first = int(np.searchsorted(self.rows, index[0].start or 0))
            count = len(range(*index[0].indices(self.batch.tokens.shape[0])))
            return rows[name][first : first + count, index[1]]

        return Batch(
            **{
                name: jax.make_array_from_callback(abstract.shape, abstract.sharding, partial(part, name))
                for name, abstract in self.batch._asdict().items()
            }
        )
