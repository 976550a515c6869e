"""Sub-networks to measure, so that their times tell the coefficients of a latency apart."""

import itertools
from collections.abc import Sequence

from flax_skd.method import latency
from flax_skd.method.spec import SubnetSpec, ViTSpec

# Which branches are left: (name, function of the block and whether it is the MLP). The
# first three of narrow networks too, as the small levels of a list are.
_LEFT = [
    ("every other branch", lambda i, mlp: (i + mlp) % 2),
    ("heads alone", lambda i, mlp: not mlp),
    ("mlp alone", lambda i, mlp: mlp),
    ("half of the heads", lambda i, mlp: mlp or i % 2),
    ("half of the mlp", lambda i, mlp: not mlp or i % 2),
    ("half of all", lambda i, mlp: i % 2),
    ("no branch", lambda i, mlp: 0),
]


def design(
    spec: ViTSpec, *, shares: Sequence[float], attn_lane: int = 1, mlp_lane: int = 1
) -> dict[str, SubnetSpec]:
    """Sub-networks to measure: widths cut alone and together, branches removed, both.

    Args:
      spec: the full network.
      shares: of the dims kept, each in (0, 1).
      attn_lane, mlp_lane: sizes are rounded up to multiples.

    Returns:
      Name -> widths; the first is the full network.
    """
    full = SubnetSpec.full(spec)
    kinds = {
        "qk": ("qk_dim",),
        "vo": ("vo_dim",),
        "heads": ("qk_dim", "vo_dim"),
        "mlp": ("mlp_dim",),
        "all": SubnetSpec._fields,
    }
    found = {"full": full}
    sizes = {field: widths[0] for field, widths in full._asdict().items()}
    lanes = dict(zip(full._fields, (attn_lane, attn_lane, mlp_lane)))
    for share, (kind, fields) in itertools.product(shares, kinds.items()):
        if not 0 < share < 1:
            raise ValueError(f"a share of {share:g} must lie between 0 and 1.")
        cut = {
            f: latency.round_up(share * sizes[f], sizes[f], lanes[f]) for f in fields
        }
        alike = {f: (width,) * spec.depth for f, width in cut.items()}
        found[f"{kind} {share:g}"] = full._replace(**alike)
    for base, patterns in [("full", _LEFT)] + [
        (f"all {share:g}", _LEFT[:3]) for share in shares
    ]:
        for name, there in patterns:
            kept = [
                tuple(w * there(i, f == "mlp_dim") for i, w in enumerate(widths))
                for f, widths in found[base]._asdict().items()
            ]
            found[f"{base}, {name}"] = SubnetSpec(*kept)
    return {name: widths.check(spec) for name, widths in found.items()}


def stairs(spec: ViTSpec, *, above_half: Sequence[int]) -> dict[str, SubnetSpec]:
    """Sub-networks a few dims apart, which show what widths the hardware likes.

    Args:
      spec: the full network.
      above_half: dims more than half the branch, such as 0, 1, 2, 4, 8.

    Returns:
      `heads W` and `mlp W` -> that width in every block, the other branch full.
    """
    full, found = SubnetSpec.full(spec), {}
    for name, fields in (("heads", ("qk_dim", "vo_dim")), ("mlp", ("mlp_dim",))):
        size = getattr(full, fields[0])[0]
        for width in sorted({min(size, size // 2 + more) for more in above_half}):
            cut = dict.fromkeys(fields, (width,) * spec.depth)
            found[f"{name} {width}"] = full._replace(**cut).check(spec)
    return found
