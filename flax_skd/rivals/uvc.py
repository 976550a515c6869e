"""UVC: one structure within a budget of MACs, by duals, while the weights train."""

from typing import Any

import jax
import jax.numpy as jnp

from flax_skd.method import losses, piad
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.method.vit import BlockMasks, ViT
from flax_skd.rivals import start, structure
from flax_skd.rivals.structure import Structure
from flax_skd.run import configured_loss, distillation, sharding
from flax_skd.run.objective import Array, CutOf, Masks
from flax_skd.run.programs import Program, save_trained
from flax_skd.run.train import AfterUpdate


def sampled_gates(rng: Array, gates: Array, *, temperature: float) -> Array:
    """Gumbel-sigmoid, hard where it acts and soft in its gradient: [L, 2] of 0 and 1."""
    noise = jax.random.logistic(rng, gates.shape)
    soft = jax.nn.sigmoid((gates + noise) / temperature)
    hard = (soft > 0.5).astype(soft.dtype)
    return soft + jax.lax.stop_gradient(hard - soft)


def block_masks(found: Structure, on: Array) -> Masks:
    """Masks of a structure, its branches on (1) or off (0)."""
    rows = zip(*(found.masks[kind] for kind in ("qk", "vo", "mlp")), on, strict=True)
    return tuple(BlockMasks(qk, vo, mlp, *gates) for qk, vo, mlp, gates in rows)


def gated(spec: ViTSpec, *, temperature: float) -> CutOf:
    """`CutOf` of both stages: gates drawn in the search, masks once it is fixed."""

    def cut_of(params, rng, batch_size, state):
        del batch_size
        found = state.extra
        drawn = sampled_gates(rng, found.gates, temperature=temperature)
        on = jnp.where(found.stage > 0, found.on, jax.lax.stop_gradient(drawn))
        metrics = {
            "macs_share": structure.expected_share(spec, found.cut, found.gates),
            "budget_dual": found.budget_dual,
        }
        return params, block_masks(found, on), metrics

    return cut_of


def search(
    model: ViT,
    *,
    budget: float,
    rates: structure.Rates,
    gate_rate: float,
    gate_every: int,
    temperature: float,
) -> AfterUpdate:
    """`after_update` of the search; nothing once the structure is fixed.

    Args:
      model: the full network.
      budget: share of its MACs.
      rates: see `structure.Rates`.
      gate_rate: of the gates' steps.
      gate_every: updates between two of them.
      temperature: of the Gumbel-sigmoid.
    """
    spec = model.spec

    def of_gates(gates, found, params, batch, rng):
        on = sampled_gates(rng, gates, temperature=temperature)
        logits = model.apply({"params": params}, batch["image"], block_masks(found, on))
        share = structure.expected_share(spec, found.cut, gates)
        return losses.cross_entropy(logits, batch["label"]) + found.budget_dual * share

    def step(before, after, batch):
        found, taken = structure.searched(
            after.extra, after.params, spec, budget=budget, rates=rates
        )
        params = structure.shrunk(after.params, found, taken, rate=rates.shrink)
        rng = jax.random.fold_in(jax.random.fold_in(before.rng, before.step), 1)

        def moved(gates):
            return gates - gate_rate * jax.grad(of_gates)(
                gates, found, params, batch, rng
            )

        due = after.step % gate_every == 0
        gates = jax.lax.cond(due, moved, lambda gates: gates, found.gates)
        return after._replace(params=params, extra=found._replace(gates=gates))

    def after_update(before, after, batch, metrics):
        del metrics
        return jax.lax.cond(
            before.extra.stage == 0,
            lambda: step(before, after, batch),
            lambda: after,
        )

    return after_update


def _checked(config: Any) -> None:
    options = config.rival
    if not 0 < options.budget < 1:
        raise ValueError(f"rival.budget = {options.budget} must lie in (0, 1).")
    if not 0 < options.search_epochs < config.epochs:
        raise ValueError(
            f"rival.search_epochs = {options.search_epochs} must lie in (0, "
            f"{config.epochs}): the rest trains the structure found."
        )
    if options.gate_every < 1:
        raise ValueError(f"rival.gate_every = {options.gate_every} must be at least 1.")


def program(config: Any) -> Program:
    """A super-network of two levels: the full network, and the structure found.

    Simpler than the paper: head dims have one width a block, and whole heads are not
    cut, since `SubnetSpec` has no such sizes; a gate skips one branch, not a block;
    Gumbel-sigmoid gates are drawn hard. The structure is fixed so that its MACs, as
    extracted, fit the budget. Then it trains masked, which is the same function.
    """
    _checked(config)
    found, options = start.network(config), config.rival
    spec, mesh = found.spec, sharding.mesh(config.mesh)
    model = configured_loss.vit_of(config, spec)
    loss = distillation.with_teacher(
        model,
        configured_loss.taught_by(config, spec, spec),
        cut_of=gated(spec, temperature=options.gate_temperature),
        label_smoothing=configured_loss.smoothing_of(config),
    )

    def widths_of(extra):
        counts = (extra.masks[k].sum(-1).astype(int) for k in ("qk", "vo", "mlp"))
        return SubnetSpec(*counts).check(spec)

    def begin(index, state):
        if index != 1:
            return state.extra
        now = jax.device_get(state.extra)
        widths = structure.widths_within(now, spec, options.budget)
        params = sharding.gathered(state.params, mesh)
        norms = jax.device_get(
            jax.jit(structure.group_norms, static_argnums=1)(params, spec)
        )
        return structure.fixed(now, widths, norms)

    def sizes(extra):
        small = {"structure": widths_of(extra)} if extra.stage else {}
        return {"full": None, **small}

    def save(directory, params, extra, facts):
        rows = [SubnetSpec.full(spec), widths_of(extra)]
        ordered = jax.device_get(structure.kept_first(params, extra.masks))
        nested = piad.from_rows(rows, spec)
        trained = found._replace(params=ordered, dropout_list=nested)
        save_trained(directory, trained, {**facts, "trained": "uvc"})

    return Program(
        model,
        found.params,
        configured_loss.mixed_loss(config, spec, loss),
        save,
        extra=structure.start(spec, gate=options.gate_start),
        before_epoch=begin,
        every_epochs=options.search_epochs,
        stages=2,
        sizes=sizes,
        after_update=search(
            model,
            budget=options.budget,
            rates=structure.Rates(**options.rates),
            gate_rate=options.gate_rate,
            gate_every=options.gate_every,
            temperature=options.gate_temperature,
        ),
        network=lambda params, extra: structure.kept_first(params, extra.masks),
        frozen=found.params,
    )
