"""Who joins which run: flags, a TPU pod's environment, and what makes no sense."""

import jax
import pytest

from flax_skd.run import distributed


@pytest.fixture
def joined(monkeypatch):
    """Arguments of every call of `jax.distributed.initialize`, which does nothing."""
    calls = []
    for name in ("TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **kw: calls.append(kw))
    return calls


def test_one_machine_joins_nothing(joined, monkeypatch):
    distributed.start()
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    distributed.start()
    assert joined == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TPU_WORKER_HOSTNAMES", "10.0.0.1,10.0.0.2"),
        ("MEGASCALE_COORDINATOR_ADDRESS", "10.0.0.1"),
    ],
)
def test_a_tpu_pod_needs_no_flag(joined, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    distributed.start()
    assert joined == [{}]


def test_a_cluster_is_found_if_asked(joined):
    distributed.start(detect=True)
    assert joined == [{}]


def test_a_cluster_that_is_not_there_is_said(joined, monkeypatch):
    def initialize():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ValueError, match="no cluster .*defined.*--coordinator=HOST"):
        distributed.start(detect=True)


def test_named_processes_meet_at_the_coordinator(joined):
    distributed.start(coordinator="h:1234", processes=4, process=3)
    want = {"coordinator_address": "h:1234", "num_processes": 4, "process_id": 3}
    assert joined == [want]


def test_a_run_that_is_joined_is_not_joined_again(joined, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    distributed.start(coordinator="h:1234", processes=4, process=3)
    assert joined == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"processes": 2, "process": 0}, "go together; got coordinator None"),
        ({"coordinator": "h:1"}, "go together"),
        ({"coordinator": "h", "processes": 2, "process": 0}, "write HOST:PORT"),
        ({"coordinator": "h:x", "processes": 2, "process": 0}, "write HOST:PORT"),
        ({"coordinator": "h:1", "processes": 2, "process": 2}, "choose 0 to 1"),
        ({"coordinator": "h:1", "processes": 2, "process": -1}, "choose 0 to 1"),
    ],
)
def test_half_a_description_is_refused(joined, given, message):
    with pytest.raises(ValueError, match=message):
        distributed.start(**given)
    assert joined == []
