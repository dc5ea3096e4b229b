"""Any input gives a correct result or one clear error; hypothesis searches for other exceptions.

The default run has a few cases per property. `CASES=100000 pytest -m slow tests/fuzz` draws that
many in all, at random, and prints how to reproduce a failure. With fewer the cases are the same
every time, so a new failure comes from a code change.
"""

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dgpt_jax.data import image_ops
from tests.fuzz import configs, geometry, imports, stored

CASES = int(os.environ.get("CASES", "100000"))
FEW = 25
# Property → relative number of cases, lower for expensive ones.
PROPERTIES = {
    configs.parse: 10,
    configs.override: 8,
    configs.command_line: 5,
    configs.duration: 8,
    geometry.split_is_a_partition: 9,
    geometry.gathers_follow_the_order: 2,
    geometry.masks_are_causal: 1,
    geometry.crops_lie_inside: 14,
    geometry.views_are_rendered: 8,
    geometry.codec_errors_are_bounded: 10,
    stored.random_bytes_as_record: 9,
    stored.mutated_record: 10,
    stored.mutated_image: 6,
    stored.mutated_tar: 9,
    stored.mutated_metadata: 4,
    stored.mutated_shard: 1,
    imports.imported_image: 5,
    imports.imported_archive: 1,
    imports.imported_form: 1,
}


def check(prop, cases: int, scratch, derandomize: bool):
    """Runs a property, a function of (draw, directory); prints the number of cases."""
    count = 0

    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=derandomize,
        print_blob=True,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data):
        nonlocal count
        count += 1
        prop(data.draw, scratch)

    run()
    print(f"{prop.__name__}: {count} cases")


@pytest.mark.parametrize("prop", PROPERTIES, ids=lambda prop: prop.__name__)
def test_a_few(prop, tmp_path):
    check(prop, FEW, tmp_path, derandomize=True)


@pytest.mark.parametrize("ratio", [1e-300, 1e300])
def test_extreme_aspect_ratios(ratio):
    rng = np.random.default_rng(0)
    for _ in range(10):
        view = image_ops.draw_view(
            rng, 100_000, 90_000, scale=(1, 1), ratio=(ratio, ratio), flip=False
        )
        assert sorted((view.height, view.width)) == [1, 100_000 if ratio < 1 else 90_000]


@pytest.mark.slow
@pytest.mark.parametrize("prop", PROPERTIES, ids=lambda prop: prop.__name__)
def test_many(prop, tmp_path):
    cases = CASES * PROPERTIES[prop] // sum(PROPERTIES.values()) + 1
    check(prop, cases, tmp_path, derandomize=CASES < 100_000)
