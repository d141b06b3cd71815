"""The optimizer: AdamW with moments in a subspace, made of parts that its methods choose."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from inspect import Signature, signature
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from .. import ops
from ..factors.linear import all_trained_parts
from ..ops import Choice, Scalars, Side
from ..ops.contract import rank_axis
from ..ops.dispatch import ENVIRONMENT_VARIABLE
from ..ops.tensors import READER
from ..subspace import Readback, Subspace, next_look, refresh_bases
from . import monitor, report
from .batches import (
    STEP,
    Batch,
    Member,
    Prepared,
    due_of,
    facts_of,
    new_memory,
    options_of,
    phase_of,
    scalars_of,
)
from .capture import check_capture
from .checkpoints import check_loadable, padded, restore, unpadded, with_method
from .checks import (
    check_addressable,
    check_grad,
    check_matrix,
    check_memory,
    check_params,
    check_projected_gradient,
    check_sharded,
    check_shared,
    tell_what_has_no_effect,
)
from .families import tie
from .formats import (
    BasisFormat,
    MasterBits,
    StateFormat,
    check_format,
    format_for,
    moments_dtype,
    moments_of,
)
from .groups import (
    FORMAT,
    PROJECTION_DEFAULTS,
    Group,
    NamedGroups,
    check_options,
    is_projected,
    named_groups,
    named_params,
    normalized,
    side_for,
    size_of,
)
from .outside import LIMITED, Outside, Per, ResidualForm
from .parts import Method, Rounding
from .placement import check_spread, divides, facts_here, is_sharded, local
from .projected_gradient import Projector, held, is_projected_gradient
from .state import (
    State,
    check_shapes,
    check_step,
    check_storage,
    keep_up,
    new_state,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# What every step goes by beside the groups.
PART_NAMES = (
    "residual",
    "residual_scale",
    "residual_momentum",
    "per",
    "_corrected",
    "subspace",
    "backend",
    "rounding",
    "capturable",
    "monitor",
    "state_format",
    "basis_format",
    "master",
)
PARTS = attrgetter(*PART_NAMES)
# Of the constructors in galore-torch and fira that have no counterpart here.
FOREIGN_ARGUMENTS = (
    *("correct_bias", "no_deprecation_warning", "amsgrad", "optim_bits", "args", "min_8bit_size"),
    *("percentile_clipping", "block_wise", "is_paged"),
)
AUTOCAST_DEVICES = tuple(
    filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps", "hpu", "privateuseone"))
)

logger = logging.getLogger("lowrank_kernels")

Function = TypeVar("Function", bound=Callable[..., Any])


def _as_it_is(function: Function) -> Function:
    return function


# A compiled step would be cut into dozens of graphs, and its kernels are compiled already. The
# public torch.compiler.disable would import dynamo, 1.3 s, together with this package.
not_compiled: Callable[[Function], Function] = getattr(torch, "_disable_dynamo", _as_it_is)


class _OfInit:
    """The signature of a class whose `__new__` takes everything, for whom `help` shows that one."""

    def __get__(self, _: object, owner: type) -> Signature:
        own = signature(owner.__init__)  # type: ignore[misc]
        _self, *parameters = own.parameters.values()
        return own.replace(parameters=parameters)


class LowRankAdamW(Optimizer):
    """AdamW whose moments live in a low-rank subspace of the gradient.

    Groups with a `rank` are projected and take these keys, the same as in `galore-torch` and
    `fira`; groups without one are torch's AdamW:

        rank             r; cut to min(rows, cols) with a notice
        update_proj_gap  T, steps between two bases, default 200
        scale            alpha of the papers (also accepted as `alpha`), default 0.25
        proj_type        "std" (default: the smaller side is compressed, squares on the right),
                         "reverse_std", "left", "right"

    A group with a `scale` and no rank is AdamW at lr * scale: as fast as projected weights, for
    those beside them that are not projected. Its weight decay stays lr * weight_decay.

    Weight decay is decoupled. In projected groups it comes after the update, on the new weight, as
    in the official code: W <- (1 - lr wd)(W - update). `eps` is added to sqrt(V) before the bias
    correction, again as there, with residual=None and "official"; every other form adds it after.

    A gradient channel that holds NaN or Inf, or a projected entry too large to be squared, is left
    out of the step. A basis is never computed from a zero or non-finite gradient: the old one stays
    and the next step tries again.

    Args:
        params: parameters, (name, parameter) pairs or groups; see `param_groups`.
        lr: learning rate, float or one-element tensor.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        residual: what of the gradient outside of the subspace, E = G - back(R), is added to the
            update. None: nothing (GaLore). "official", "paper": E by channels, scaled as Adam
            scales R and limited in growth, as Fira's code and its algorithm 1 do. "scale": all of G
            so, and nothing else (APOLLO, see `ApolloAdamW`). "normalize": each channel of E at a
            root mean square of 1, if it is above 1e-19; "sign": its signs; "orthogonal": nearly its
            orthogonal factor, by Newton-Schulz iterations; each times `residual_scale`, without a
            state of their own.
        residual_scale: s of the last three, beside `scale` of what is in the subspace; None: 0.4
            for "orthogonal", else that `scale`.
        residual_momentum: with "sign" and "orthogonal", the decay rate of a mean of E, held in a
            byte an element, that takes the place of E: up to 0.98, or 0 for none. Larger batches
            want more.
        per: of "scale", whether norms of each "channel" or of the "matrix" are compared.
        corrected: whether the moments are corrected for their bias, as in torch's AdamW, or the
            step size, as in the official code of GaLore and Fira; None: the step size with
            residual=None and "official", the moments with every other form.
        subspace: a `Subspace`, or the name of a range finder: "randomized" (default), "power",
            "random", or "svd", which computes all bases at once by an exact SVD as the official
            packages do. The named ones spread their refreshes over the steps, except "svd" and
            with `capturable`.
        backend: "auto", "reference", "foreach", "native" or "triton"; `LOWRANK_BACKEND` overrides
            it.
        maximize: ascend instead of descend.
        rounding: "nearest", or "stochastic" for the projected bfloat16 weights: a step smaller than
            half a unit in the last place of a weight then moves it in the mean instead of never.
            The noise depends on the parameter's name (its place, without names) and step only.
        capturable: counts steps on the device, so that a CUDA graph can capture a step and replay
            it, with `lr` as a tensor on that device. A replay keeps the basis: take an eager step
            where one is due, every `update_proj_gap` steps. An eager step then waits for the device
            once. It needs state that stays in place: no adaptive rank, no reset moments and no
            criterion.
        state: in which format moments are held: "float32" (float64 for float64 weights),
            "bfloat16", or "int8", codes of 8 bits with a float32 scale for 64 channels of a
            direction, or for 256 elements of a parameter that is not projected. Vectors and other
            small parameters that are not projected stay float32, as do shards and other subclasses
            whose values lie in other tensors. V is rounded stochastically, with noise that depends
            on the parameter's name and step only.
        basis: in which format bases are held: in the "weight"'s dtype, in "int8" with a power of
            two for each column, or in "int4" with a scale for 64 entries of a column (int8 for
            bases of an odd number of rows), which keeps nine tenths of each direction. They are
            decoded a batch at a time.
        master: 24 holds bfloat16 weights to 24 bits: the upper 16 where the model finds them, 8 in
            the state, so that no step is lost that is more than 2^-16 of its weight. In place of
            float32 copies, which take 4 bytes a weight. What other code writes into a weight is
            seen at the next step, with the old byte beside it: to half a unit in its last place.
        monitor: counts non-finite gradients and steps held back by Fira's limiter for `stats`, and
            lets it tell the gradient's noise, at the cost of a few small launches a matrix. Steps
            without it forget what was counted.
        process_group: of torch.distributed, whose ranks have equal weights and gradients, as under
            DistributedDataParallel: each basis that is due is then computed by one of them and sent
            to the others, n r elements, so that ranks share that work and have the same bits on
            unlike devices too. None: every rank computes all. Not for DTensors, whose mesh says who
            shares them; copies of an optimizer, and what is unpickled, have none.

    Attributes:
        state_format, basis_format, master: the arguments `state`, `basis` and `master`. They may be
            written to between steps; the next step converts what it finds, each value to the
            nearest, begins low bits at zero, and drops those that are no longer asked for.
        residual, residual_scale, residual_momentum: the arguments; may be written to as well. They
            are of all groups, and a resumed run has those that its constructor is given.

    Raises:
        ValueError, TypeError: an option or a parameter does not fit; the text names it.
        BackendUnavailable: a backend was named that cannot run in this installation.

    Sources: GaLore (arXiv 2403.03507), Fira (arXiv 2410.01623).
    """

    _room_memory = staticmethod(new_memory)
    _grouped: tuple[list[int], dict[Tensor, Group]]
    __signature__ = _OfInit()
    # On the rates of steps that are taken outside of `step`, in the backward pass.
    lr_factor = 1.0
    process_group: "ProcessGroup | None" = None
    # Whether some of what is stepped are DTensors.
    _sharded = False
    # What all ranks were found to agree on, of those.
    _agreed: list[list[str]] | None = None
    # The same of copies in a process group, and for what it was looked at.
    _lines: list[str] | None = None
    _compared: Prepared | None = None

    def __new__(cls, *args: Any, **options: Any) -> "LowRankAdamW":
        """Says where the options of groups belong, which many try here first, and which arguments
        of the optimizers that these stand in for are to be dropped.
        """
        misplaced = sorted({"rank", "alpha", *PROJECTION_DEFAULTS} & options.keys())
        if misplaced:
            raise TypeError(
                f"{', '.join(misplaced)}: options of parameter groups, not of the optimizer: build"
                f" the groups with lowrank_kernels.param_groups(model, rank=...)"
            )
        if foreign := sorted(set(FOREIGN_ARGUMENTS) & options.keys()):
            raise TypeError(
                f"{', '.join(foreign)}: of galore_torch or fira, and of no meaning here: leave out."
                " The format of moments is `state`; the bias is always corrected"
            )
        return super().__new__(cls)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        residual: ResidualForm | None = None,
        residual_scale: float | None = None,
        residual_momentum: float = 0.0,
        per: Per = "channel",
        corrected: bool | None = None,
        subspace: Subspace | str = "randomized",
        backend: str = "auto",
        maximize: bool = False,
        rounding: Rounding = "nearest",
        capturable: bool = False,
        state: StateFormat = "float32",
        basis: BasisFormat = "weight",
        master: MasterBits = None,
        monitor: bool = False,
        process_group: "ProcessGroup | None" = None,
    ) -> None:
        if process_group is not None:
            # Imported for those who have a group.
            from .replicas import check_process_group

            check_process_group(process_group)
            self.process_group = process_group
        self.subspace = Subspace.named(subspace, stagger=not capturable)
        self.residual, self.backend = residual, backend
        self.residual_scale, self.residual_momentum = residual_scale, residual_momentum
        self.per: Per = per
        self._corrected = corrected
        self.rounding, self.capturable, self.monitor = rounding, capturable, monitor
        # `state` is what torch calls the states themselves.
        self.state_format: StateFormat = state
        self.basis_format: BasisFormat = basis
        self.master: MasterBits = master
        self.method.check()
        ops.requested_backend(backend)
        self._begin_anew()
        self._judged = False
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "format": FORMAT,
            "method": self.method.described(),
        }
        super().__init__(params, defaults)
        self._judge(self._params())

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group, as `torch.optim.Optimizer.add_param_group`; checked before it is added."""
        index = len(self.param_groups)
        group = normalized(param_group, self.defaults, index)
        check_params(group, index)
        for name, param in named_params(group, index):
            # What is not trained needs no format.
            if isinstance(param, Tensor) and param.requires_grad:
                check_format(name, param, self.state_format)
                check_sharded(name, param, group, self.method, self.process_group)
        super().add_param_group(group)

    @not_compiled
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Takes one step.

        Args:
            closure: evaluates the model again, under enabled gradients, and returns the loss.

        Returns:
            The loss of the closure, if there is one.

        Raises:
            ValueError, RuntimeError, NotImplementedError: a gradient, a weight or a state does not
                fit; nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    def _step(self) -> None:
        """What changed? New bases where they are due; then each batch."""
        with ExitStack() as stack:
            for device_type in filter(torch.is_autocast_enabled, AUTOCAST_DEVICES):
                stack.enter_context(torch.autocast(device_type, enabled=False))
            prepared = self._prepared()
            refreshed = False
            if self.process_group is not None:
                refreshed = self._refresh_copies(prepared)
            else:
                for batches in prepared.by_group:
                    if due := due_of(batches, self.subspace, self._readback):
                        refresh_bases(due, self.subspace)
                        refreshed = True
            if prepared.sharded is not None:
                claims = prepared.sharded.claims
                if claims != self._agreed:
                    prepared.sharded.agree(self._agreed)
                    self._agreed = claims
                refreshed |= prepared.sharded.refresh(self.subspace, self._readback)
            if refreshed:
                prepared = self._prepared()
            for batches in prepared.by_group:
                READER.add_one([state["step"] for batch in batches for state in batch.states])
                every = zip(batches, scalars_of(batches, prepared.method), strict=True)
                for batch, scalars in every:
                    self._step_batch(batch, scalars)
            if prepared.empty:
                READER.add_one(list(map(STEP, prepared.empty)))
            if prepared.sharded is not None:
                prepared.sharded.step(self)
            for plain in prepared.plain:
                plain.step()

    def _refresh_copies(self, prepared: Prepared) -> bool:
        """Gives new bases to those of ranks' copies that are due; whether there were any."""
        assert self.process_group is not None
        from .replicas import agree_on_change, lines_of, refresh_replicas

        # What changes nothing needs no word.
        if self._lines is None or prepared is not self._compared:
            lines = lines_of(self._named_groups(), self.method)
            if self._lines is not None and lines != self._lines:
                agree_on_change(lines, self._lines, self.process_group)
            self._compared, self._lines = prepared, lines
        due = [
            item
            for batches in prepared.by_group
            for item in due_of(batches, self.subspace, self._readback)
        ]
        if due:
            refresh_replicas(due, self._lines, self.process_group, self.subspace)
        return bool(due)

    def _step_batch(self, batch: Batch, scalars: Scalars) -> None:
        """Project, scale, update."""
        matrices, operations = batch.matrices(), batch.operations
        before = [norm.clone() for norm in matrices.limiter_norms] if self.monitor else []
        projection = operations.project_moments(matrices, scalars.adam, scalars.step)
        if self.subspace.criterion is not None:
            batch.measure(projection, self.subspace, self._readback)
        if batch.room.weights:
            batch.room.load_weights(batch.params, batch.states)
        if batch.updater is not None:
            batch.updater.update(matrices, batch.states, projection, scalars)
        else:
            sums, factor = projection.sums, None
            if sums is not None:
                factor = operations.channel_scale(matrices, sums)
            operations.back_project_update(matrices, projection, factor, scalars)
        if batch.room.weights:
            batch.room.store_weights(batch.params, batch.states)
        if self.monitor:
            finite = monitor.count(batch.states, matrices, before)
            monitor.note_norms(batch.states, projection.projected, finite, scalars.adam.beta1)

    def _params(self) -> Iterator[Tensor]:
        return (param for group in self.param_groups for param in group["params"])

    def _judge(self, params: Iterable[Tensor]) -> None:
        """Warns if the given parameters that are trained have no projected one among them.

        Factors are meant to be plain, and the optimizer of a single parameter, as gradient release
        uses them, is none to judge.
        """
        trained = {param for param in params if param.requires_grad}
        groups = filter(is_projected, self.param_groups)
        projected = {param for group in groups for param in group["params"]}
        if self._judged or len(trained) < 2 or trained & (projected | all_trained_parts()):
            return
        self._judged = True
        logger.warning(
            "no trained parameter is in a group with a rank, so this is plain AdamW: build the"
            " groups with lowrank_kernels.param_groups(model, rank=...)"
        )

    def explain(self) -> list[dict[str, Any]]:
        """Says how each parameter is trained.

        Returns:
            A row for every parameter: name, shape, dtype, projected, side, rank, backend, reason,
            lr, how fast it moves (lr * scale of a group with a scale), state, basis and master, in
            which formats its moments, its basis (None without one) and its weight (24 or None) are
            held, placement, of a DTensor over its mesh, and collectives, what ranks do together
            for it (None: nothing), and state_bytes, what its state holds now (0 before its first
            step). Owners are dealt by size among the matrices that are due in a step.
        """
        return report.explain(self)

    def plan(self) -> list[dict[str, Any]]:
        """Says what each parameter takes in memory, without allocating it.

        The state is what it holds after the first step with a gradient, at the group's full rank:
        its own constructors build it on the meta device, so that the parameters may lie there, too.

        Returns:
            A row for every parameter: name, shape, dtype, projected, side, rank (None of an AdamW
            parameter), state, basis and master as in `explain`, weight_bytes, gradient_bytes and
            state_bytes (both 0 if it does not require a gradient; the most that it can be with
            adaptive ranks).
        """
        return report.plan(self)

    def moments(self, param: Tensor) -> tuple[Tensor, Tensor]:
        """M and V of a parameter that has taken a step, whatever format they are held in.

        Args:
            param: of this optimizer.

        Returns:
            In the shape of R for a projected parameter, rows x r or r x cols, else in the
            parameter's; float32, float64 for float64 weights. Not to be written to: they may be the
            state's own tensors.

        Raises:
            KeyError: it has no state.
        """
        if state := self.state.get(param):
            return moments_of(state)
        for index, group in enumerate(self.param_groups):
            for name, own in named_params(group, index):
                if own is param:
                    raise KeyError(f"{name} has taken no step yet, so that it has no moments")
        raise KeyError(f"a parameter of shape {tuple(param.shape)} is none of this optimizer's")

    def stats(self) -> list[dict[str, Any]]:
        """Says what each projected parameter's subspace is doing; no factorization, no gradient.

        Everything but what `monitor` keeps is known on the host, so that every few steps are not
        too often; noise and signal take a pass over M.

        Returns:
            A row for every projected parameter that has taken a step: name, step, rank, captured
            (energy of the gradient, 0 to 1, that the basis held when it was computed), age (steps
            since then), overlap (|P_new^T P_old|^2 / r at its last change, 1 for the same span, 0
            before there was one), refreshes, kept (refreshes that failed, so that the old basis
            stayed), fallbacks (slow factorizations), deficient (gradients of a lower rank than the
            basis), gap_factor; and with `monitor`, else None, nonfinite (gradients), limited (steps
            held back by Fira's limiter), noise (sigma^2, the variance of the gradient of a batch,
            summed over the entries of R) and signal (|g|^2, the squared norm of its mean). Both are
            means over some 1 / (1 - beta1) steps, of gradients as the optimizer gets them, inside
            of the subspace; a sum over matrices and steps scatters less than one of them. The noise
            scale, the batch at which they are equal, is batch * sum of noise / sum of signal. What
            the mean moves meanwhile counts as noise, and can be nearly all of it. None before the
            second step of the moments.
        """
        return report.stats(self)

    def wants(self, param: Tensor) -> Projector | None:
        """How the next step wants a parameter's gradient: what projects it, or None for whole.

        Known before the forward pass, and the same in all of them until the step is taken. Whole is
        what AdamW, a residual, a basis that is due or missing and a criterion need.
        """
        state = self.state.get(param)
        if self.residual is not None or self.capturable or not state or "basis" not in state:
            return None
        if is_sharded(param):
            return None
        group = self._group_of(param)
        if group is None or not is_projected(group):
            return None
        gap, steps = group["update_proj_gap"], int(state["step"])
        phase = phase_of(state, gap, self.subspace)
        due = next_look(state, steps, gap, phase, self.subspace) <= steps
        return None if due else Projector.of(state)

    def side_of(self, param: Tensor) -> Side:
        """Which side of a projected parameter's gradient its basis multiplies, or is going to."""
        state = self.state.get(param)
        if state:
            return Side(state["side"])
        group = self._group_of(param)
        assert group is not None
        return side_for(group, param)

    def _group_of(self, param: Tensor) -> Group | None:
        """The group that a parameter is in; None if it was taken out."""
        ids, groups = self._grouped
        if ids != list(map(id, self.param_groups)) or param not in groups:
            groups = {own: group for group in self.param_groups for own in group["params"]}
            self._grouped = list(map(id, self.param_groups)), groups
        return groups.get(param)

    def __repr__(self) -> str:
        return report.described(self, super().__repr__())

    def state_dict(self) -> State:
        """As `torch.optim.Optimizer.state_dict`; states of a smaller, adaptive rank are filled up
        with zeros to the group's, so that every checkpoint of a model has the same shapes.
        """

        def fill(_: Optimizer, saved: State) -> State:
            states, groups = saved["state"], saved["param_groups"]
            told = with_method(groups, states, self.method)
            return {**saved, "param_groups": told, "state": padded(states, groups)}

        # Before the user's own hooks.
        handle = self.register_state_dict_post_hook(fill, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: State) -> None:
        """Loads a state dict.

        Moments, bases and the low bits of weights get this optimizer's formats, whatever they were
        saved in; options of groups are those of the state dict, as in torch. What was converted,
        rank, scale and other options of the projection that differ, and a method that differs, are
        told by a warning of the logger `lowrank_kernels`.

        Raises:
            ValueError: the state dict is of a newer format, of another optimizer, for other shapes
                or for parameters in another order, or its bases are Gaussian where this optimizer's
                are orthonormal, or the other way round, or too coarse for its residual; the text
                names the parameter, and nothing was changed.
        """
        incoming: State = {}
        names = [group.get("param_names") for group in self.param_groups]

        def inspect(_: Optimizer, candidate: State) -> State:
            candidate = {**candidate, "state": unpadded(candidate["state"])}
            check_loadable(self.param_groups, candidate, self.method)
            incoming.update(candidate)
            return candidate

        def put_back(_: Optimizer) -> None:
            restore(self.state, self.param_groups, incoming, self.method)
            for group, own_names in zip(self.param_groups, names, strict=True):
                group |= {"format": FORMAT, "method": self.method.described()}
                if own_names is not None:
                    group["param_names"] = own_names

        # Between the user's own hooks: after those that change the state dict, before those that
        # change what was loaded.
        handles = (
            self.register_load_state_dict_pre_hook(inspect),
            self.register_load_state_dict_post_hook(put_back, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **dict(zip(PART_NAMES, PARTS(self), strict=True))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin_anew()  # torch comes here when it loads a state dict, too
        self._judged = True
        for group in self.param_groups:
            group.setdefault("maximize", False)
            group.setdefault("format", FORMAT)
            group.setdefault("method", self.method.described())

    def _begin_anew(self) -> None:
        """Forgets what was prepared for other parameters or states."""
        self._known: Prepared | None = None
        self._options: list[object] = []
        self._counted: dict[Tensor, int] = {}
        self._readback = Readback()
        self._grouped = [], {}
        self._sharded, self._compared = False, None

    @property
    def corrected(self) -> bool:
        """Whether the moments are corrected for their bias, instead of the step size."""
        if self._corrected is not None:
            return self._corrected
        return self.residual not in (None, "official")

    @property
    def outside(self) -> Outside:
        """The form of the residual and its options."""
        return Outside(self.residual, self.residual_scale, self.residual_momentum, self.per)

    @property
    def method(self) -> Method:
        """The parts as they are now, attributes of their own."""
        return Method(
            self.outside,
            self.corrected,
            self.subspace,
            self.rounding,
            self.capturable,
            self.monitor,
            self.state_format,
            self.basis_format,
            self.master,
        )

    def _prepared(self) -> Prepared:
        """The batches as they are, made anew if anything changed that they were prepared for.

        Raises:
            ValueError, RuntimeError, TypeError: see `step`; nothing was changed.
        """
        options = [self.capturable, *options_of(self.param_groups)]
        if options != self._options:
            for index, group, _ in self._named_groups():
                check_options(group, index, self.capturable)
            self._options = options
        capturing = _capturing()
        if capturing:
            self._check_capture()
        known = self._known
        if known is None or known.facts != self._facts() or not self._count(known, capturing):
            known = self._known = self._prepare()
            self._count(known, capturing)
        if known.sharded is not None:
            known.sharded.load()
        known.check_gradients()
        return known

    def _facts(self) -> tuple[object, ...]:
        """What has to be equal for batches to serve again."""
        facts = facts_of(
            self.param_groups,
            self.state,
            limited=self.residual in LIMITED,
            coded=self.state_format == "int8",
            coded_basis=self.basis_format != "weight",
            low_bits=self.master is not None,
        )
        never_equal = object()
        here: list[object] = []
        if self._sharded:
            trained = [param for param in self._params() if param.grad is not None]
            here = facts_here(trained, self.state)
        return *PARTS(self), os.environ.get(ENVIRONMENT_VARIABLE), facts or never_equal, *here

    def _prepare(self) -> Prepared:
        """Checks everything, then creates the states that are not there, then makes batches."""
        self.method.check()
        checked = self._checked()
        if not self._judged:
            self._judge(param for _, params in checked for _, param, *_ in params)
            self._judged = True
        tell_what_has_no_effect(self.param_groups, self.method)
        members = [
            (group, [self._member(group, place, *each) for place, each in enumerate(params)])
            for group, params in checked
        ]
        tie(member.state for _, own in members for member in own)
        self._sharded = any(is_sharded(member.param) for _, own in members for member in own)
        # Other ranks may have gradients of them, and are not to wait.
        idle = [
            (group, name, param, self.side_of(param))
            for _, group, named in self._named_groups()
            for name, param, _ in named
            if is_projected(group) and is_sharded(param) and _is_idle(param)
        ]
        return Prepared(self._facts(), members, self.method, self._room_memory, idle)

    def _named_groups(self) -> NamedGroups:
        return named_groups(self.param_groups)

    def _checked(self) -> list[tuple[Group, list[tuple[str, Tensor, int, str]]]]:
        """Name, parameter, salt and backend of those that have a gradient, a list a group."""
        request, checked = ops.requested_backend(self.backend), []
        for _, group, named in self._named_groups():
            params = [
                (name, param, salt, self._checked_backend(name, param, group, request))
                for name, param, salt in named
                if param.grad is not None
            ]
            checked.append((group, params))
        check_shared(
            (name, param, is_projected(group))
            for group, params in checked
            for name, param, *_ in params
        )
        return checked

    def _checked_backend(self, name: str, param: Tensor, group: Group, request: str) -> str:
        """Who computes a parameter's step, once it is known that one can be taken."""
        assert param.grad is not None
        check_grad(name, param, param.grad)
        check_sharded(name, param, group, self.method, self.process_group)
        serves = is_projected(group) and self.residual is None
        check_projected_gradient(name, param, serves)
        check_format(name, param, self.state_format)
        backend = "torch"
        if is_projected(group):
            check_matrix(name, param)
            check_memory(name, param)
            backend = self.choice(request, group, name, param).backend
        if state := self.state.get(param):
            check_shapes(name, param, state, is_projected(group))
            check_storage(name, param, state)
            check_spread(name, param, state)
            check_step(name, state)
        return backend

    def _member(
        self, group: Group, place: int, name: str, param: Tensor, salt: int, backend: str
    ) -> Member:
        """With its state, which is created or brought up to date."""
        state = self.state[param]
        if state:
            keep_up(state, param, group, salt, self.method)
        else:
            state.update(new_state(param, group, salt, self.method))
        return Member(name, param, state, place, backend)

    def _check_capture(self) -> None:
        check_capture(self, self._counted)

    def _count(self, prepared: Prepared, capturing: bool) -> bool:
        """Brings the steps that each matrix has taken to the host; False if a batch's differ.

        With `capturable` they are counted on the device, since a replayed graph runs no Python: an
        eager step waits once to read them, and a capture goes by what the last one read.
        """
        if not self.capturable:
            for batch in prepared.batches:
                batch.counts = READER.counts(list(map(STEP, batch.states)))
                if not 0 <= min(batch.counts) == max(batch.counts):
                    return False
            return True
        for batches in prepared.by_group:
            if not capturing:
                states = [state for batch in batches for state in batch.states]
                counts = torch.stack([state["step"] for state in states]).int().tolist()
                params = [param for batch in batches for param in batch.params]
                self._counted |= {p: count + 1 for p, count in zip(params, counts, strict=True)}
            for batch in batches:
                batch.counts = [self._counted[param] - 1 for param in batch.params]
        return True

    def choice(self, request: str, group: Group, name: str, param: Tensor) -> Choice:
        """Who computes a projected parameter's step, and why; ValueError if nobody can."""
        size, capturable = size_of(group, param), self.capturable
        form = format_for(param, True, self.state_format)
        if divides(param, rank_axis(size.side)):
            reason = "R is a sum over ranks, after a product of its own"
            return Choice("reference" if request == "reference" else "foreach", reason)
        choice = ops.choose(
            request,
            local(param),
            None if param.grad is None else local(held(param.grad)),
            capturable=capturable,
            size=size,
            moments=moments_dtype(param, form),
            projected=is_projected_gradient(param.grad),
        )
        check_addressable(name, local(param), choice.backend)
        return choice


def _is_idle(param: Tensor) -> bool:
    return param.requires_grad and param.grad is None


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
