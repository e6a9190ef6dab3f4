"""What bench/gpu.sh draws inside the host on a GPU, here on a CPU."""

import pytest

from tests.host.boot import Host
from tests.host.card import DEMO, Card, draw


@pytest.mark.cpu
@pytest.mark.newest
def test_a_picture_is_drawn_part_by_part_on_the_real_device(host: Host) -> None:
    parts = draw(host, Card(real=True), DEMO, side=64, steps=1)
    assert [part.part for part in parts] == [
        "prompt of 280 words",
        "negative prompt",
        "sampling with guidance",
        "decoding",
    ]
    assert all(part.seconds > 0 for part in parts)
