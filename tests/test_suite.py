"""The suite itself: what it tests on which device."""

import os
from pathlib import Path

import pytest
import torch

CONFTEST = Path(__file__).with_name("conftest.py")


@pytest.mark.parametrize(
    ("expression", "expected"),
    [("gpu", True), ("gpu or slow", True), ("slow and gpu", True), ("not slow and not gpu", False), ("slow", False),
     ("", False), ("not gpu", False), ("slow and not gpu", False), ("not (slow or gpu)", False), ("not(gpu)", False),
     ("not  gpu", False), ("gpu and not (slow)", True)],
)  # fmt: skip
def test_accelerators_are_hidden_unless_gpu_tests_are_asked_for(pytestconfig, expression, expected):
    assert pytestconfig.pluginmanager.get_plugin(str(CONFTEST)).wants_gpu(expression) is expected


def test_the_ordinary_suite_sees_no_gpu(pytestconfig):
    if pytestconfig.pluginmanager.get_plugin(str(CONFTEST)).wants_gpu(pytestconfig.option.markexpr):
        pytest.skip("gpu tests were asked for")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "", "what the processes that tests start inherit"
    assert not torch.cuda.is_available()
