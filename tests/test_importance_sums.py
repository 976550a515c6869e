"""From sums to importance: shares, floors and branches that are gone, by hand."""

import jax.numpy as jnp
import numpy as np

from flax_skd.method import importance
from flax_skd.method.importance import Importance, ImportanceSums
from flax_skd.method.spec import SubnetSpec


def sums(rise, attn=((1, 3), (2, 2)), mlp=((1, 1, 2), (0, 3, 1))):
    return ImportanceSums(*map(np.float32, (10, attn, mlp, rise)))


WHOLE = SubnetSpec(np.array([2, 2]), np.array([2, 2]), np.array([3, 3]))


def test_sensitivity_is_shared_out_by_gradient_times_feature():
    got = importance.from_sums(sums([[4, 8], [2, 1]]), WHOLE)
    np.testing.assert_allclose(got.attn, [[0.1, 0.3], [0.1, 0.1]])
    np.testing.assert_allclose(got.mlp, [[0.2, 0.2, 0.4], [0, 0.075, 0.025]])


def test_a_branch_that_does_harm_gets_a_thousandth_of_the_median():
    got = importance.from_sums(sums([[4, -8], [2, 1]]), WHOLE)
    np.testing.assert_allclose(got.mlp[0].sum(), 1e-3 * 0.15)
    np.testing.assert_allclose(got.attn[0].sum(), 0.4)


def test_removed_branches_do_not_count_in_the_median():
    widths = WHOLE._replace(mlp_dim=np.array([0, 0]))
    empty = sums([[4, 0], [-2, 0]], mlp=np.zeros((2, 3)))
    got = importance.from_sums(empty, widths)
    np.testing.assert_allclose(got.attn.sum(1), [0.4, 1e-3 * 0.2])
    assert (got.mlp == 0).all()


def test_rises_that_are_mostly_zero_take_their_floor_from_the_others():
    got = importance.from_sums(sums([[4, 0], [0, 0]]), WHOLE)
    np.testing.assert_allclose(got.mlp.sum(1), [4e-4, 4e-4])
    flat = importance.from_sums(sums([[0, 0], [0, -1]]), WHOLE)
    np.testing.assert_allclose(flat.mlp.sum(1), [1, 1])


def test_a_branch_without_gradient_is_shared_out_evenly():
    widths = WHOLE._replace(mlp_dim=np.array([2, 3]))
    got = importance.from_sums(
        sums([[4, 8], [2, 1]], mlp=[[0, 0, 0], [0, 3, 1]]), widths
    )
    np.testing.assert_allclose(got.mlp[0], [0.4, 0.4, 0])


def test_checked_importance_is_float64(spec):
    got = Importance(np.ones((3, 12), np.float32), jnp.ones((3, 40))).check(spec)
    assert {field.dtype for field in got} == {np.dtype(np.float64)}
