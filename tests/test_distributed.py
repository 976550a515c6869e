"""Who joins which run: flags, a TPU pod's environment, and what makes no sense."""

import contextlib
import logging
import types

import jax
import pytest

from flax_skd.run import distributed, witness


@pytest.fixture
def joined(monkeypatch):
    """Arguments of every call of `jax.distributed.initialize`, which does nothing."""
    calls = []
    for name in ("TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv(distributed.HEARTBEAT, raising=False)

    @contextlib.contextmanager
    def watched(*of):
        calls.append(of)
        yield

    monkeypatch.setattr(distributed, "_watched", watched)
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
    assert joined == [{"heartbeat_timeout_seconds": 45}, (0, 1, "")]


def test_a_cluster_is_found_if_asked(joined):
    distributed.start(detect=True)
    assert joined == [{"heartbeat_timeout_seconds": 45}, (0, 1, "")]


def test_a_cluster_that_is_not_there_is_said(joined, monkeypatch):
    def initialize(**options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ValueError, match="no cluster .*defined.*--coordinator=HOST"):
        distributed.start(detect=True)


def test_named_processes_meet_at_the_coordinator(joined, caplog):
    with caplog.at_level(logging.INFO):
        distributed.start(coordinator="h:1234", processes=4, process=3)
    assert "process 3 of 4: waiting for the others, 300 s at most" in caplog.text
    want = {"coordinator_address": "h:1234", "num_processes": 4, "process_id": 3}
    want |= {"heartbeat_timeout_seconds": 45, "initialization_timeout": 300}
    assert joined == [(3, 4, "h:1234"), want]


def test_the_silence_that_counts_as_a_loss_can_be_set(joined, monkeypatch):
    monkeypatch.setenv("FLAX_SKD_HEARTBEAT_S", "20")
    distributed.start(coordinator="h:1234", processes=2, process=0)
    assert joined[1]["heartbeat_timeout_seconds"] == 20
    for text in ("1", "soon", "-3", ""):
        monkeypatch.setenv("FLAX_SKD_HEARTBEAT_S", text)
        with pytest.raises(ValueError, match="FLAX_SKD_HEARTBEAT_S=.*without it, 45"):
            distributed.heartbeat()


def test_one_process_waits_for_no_word_of_others():
    refused = pytest.raises(jax.errors.JaxRuntimeError, match="out of memory")
    with refused, distributed.lost_peers_named():
        raise jax.errors.JaxRuntimeError("out of memory")


@pytest.mark.parametrize("found", [True, False])
def test_a_witness_knows_whether_the_others_were_found(monkeypatch, found):
    told = []
    seen = types.SimpleNamespace(tell=told.append)
    monkeypatch.setattr(witness, "Witness", lambda *of: seen)
    monkeypatch.setattr(distributed.atexit, "register", lambda leave: None)
    with contextlib.suppress(OSError), distributed._watched(0, 2, "h:1"):
        assert told == [witness.WAITING]
        if not found:
            raise OSError("the port is taken")
    assert told[1:] == [witness.JOINED if found else witness.LEFT]


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
