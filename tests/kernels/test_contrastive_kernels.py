"""The kernels of the contrastive loss against a dense float64 matrix of logits."""

import contrastive_kernel_cases as cases
import pytest
from interpreter import run_kernels

pytest.importorskip("triton", reason="Triton is not installed")

SHAPES = [(1, 1), (1, 300), (300, 1), (128, 128), (129, 129), (257, 100), (16, 271)]


@pytest.mark.parametrize("scale", [0.0, 14.3, 100.0, -3.0])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_log_sum_exps(rows, columns, scale):
    run_kernels(cases.check_statistics, rows, columns, 64, scale, seed=0)


@pytest.mark.parametrize("scale", [0.0, 14.3, 100.0, -3.0])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_weights(rows, columns, scale):
    run_kernels(cases.check_weights, rows, columns, 64, scale, seed=1)


@pytest.mark.parametrize("width", [1, 8, 64, 100, 128])
def test_any_width(width):
    run_kernels(cases.check_statistics, 130, 70, width, 20.0, seed=2)
    run_kernels(cases.check_weights, 130, 70, width, 20.0, seed=2)


@pytest.mark.parametrize("rows", [255, 256, 400])
def test_several_launches(rows):
    run_kernels(cases.check_statistics, rows, 400, 64, 20.0, seed=3, side=256)


@pytest.mark.parametrize("seed", range(4))
def test_random_shapes(seed):
    run_kernels(cases.check_random_shapes, seed)


def test_the_log_sum_exp_of_one_pair_is_its_logit_to_the_bit():
    run_kernels(cases.check_sums_of_one_pair_are_its_logit)


def test_weights_of_matches_far_above_all_others_are_zero():
    run_kernels(cases.check_weights_of_matches_far_above_all_others_are_zero)


@pytest.mark.parametrize(("pairs", "chunk_size"), [(1, 128), (150, 128), (150, 4096), (260, 100)])
def test_the_loss_with_kernels(pairs, chunk_size):
    for scale in (14.3, 100.0):
        run_kernels(cases.check_loss, pairs, 64, scale, seed=4, chunk_size=chunk_size)


def test_two_runs_are_the_same_bit_by_bit():
    run_kernels(cases.check_two_runs_are_the_same_bits)
