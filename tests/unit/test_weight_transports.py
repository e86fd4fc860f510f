"""Guards the transports that need a GPU, on one played by the CPU: NCCL's manners (nothing meets before the first
broadcast, `wait` returns before the data is there, a dead member hangs the others) and CUDA IPC by GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from learner.weights import Weight, WeightSender
from perception.config import LearnerConfig
from perception.weights import WeightBucket
from runtime import weights
from runtime.weights import Broadcast, Inbox, checksum, join_store, open_store, storage
from tests.fake_gpu import Cuda, Ipc, Nccl, cuda

__all__ = ["cuda"]

HOST, LIMIT_S = "127.0.0.1", 0.4


def bytes_of(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def until(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ---------------------------------------------------------------- broadcast


def model(seed: int = 0, bias: bool = True) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(300, 200, bias=bias) for _ in range(5)))


def sender(parameters: nn.Module, transport: str, rank: int = 0) -> WeightSender:
    named = {name: Weight(base=parameter) for name, parameter in parameters.named_parameters()}
    config = LearnerConfig(bucket_mb=1, checksum=True, timeout_s=20)
    return WeightSender(named, config, rank=rank, device=torch.device("cpu"), transport=transport)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Ray and DeepSpeed: no weight is sharded."""
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: HOST)
    monkeypatch.setattr("learner.weights.gathered", nullcontext)


@pytest.mark.parametrize("free", [64 << 30, 1 << 30])
def test_nccl_brings_every_parameter_to_every_engine_on_one_stream_of_its_own_gpu(cuda: Cuda, free: int) -> None:
    cuda.free = free  # with less than 2 GB they wait on the host
    inboxes = {1: Inbox(), 2: Inbox()}  # engine -> what its worker, on the GPU of this number, has received
    out = sender(learner := model(), "nccl")
    for version in range(2):
        with torch.no_grad():
            learner[3].weight += version
        sums = []
        for index in range(out.open(("0.0", "1.0"))):
            bucket = out.fill_bucket(index)
            assert bucket is not None and bucket.checksum is not None
            sums.append(bucket.checksum)
            for engine, inbox in inboxes.items():
                cuda.set_device(engine)
                inbox.take("nccl", (*bucket.payload, engine, 20.0), bucket.nbytes, bucket.slots)
            cuda.set_device(0)
        assert index > 0
        out.flush()
        for inbox in inboxes.values():
            until(inbox.all_arrived)
            assert checksum(inbox.tensors()) == weights.total(sums)
            assert all(torch.equal(value, learner.get_parameter(name)) for name, value in inbox.tensors())
            inbox.clear()
            assert list(inbox.tensors()) == []
        assert cuda.emptied == 2 * (version + 1)
    assert sorted(group.rank for group in Nccl.made) == [0, 1, 2]
    for group in Nccl.made:
        ((stream, device),) = set(group.used)
        assert stream in cuda.streams and stream.device == device == group.rank
        assert len(group.used) == 2 * (index + 1)
        assert group.options._timeout.total_seconds() > (10 if group.rank == 0 else 20)
    assert len(cuda.streams) == 3


@pytest.mark.parametrize("joining", [0, 1, 2])
@pytest.mark.parametrize("device", [None, torch.device("cuda", 1)], ids=["gloo", "nccl"])
def test_engines_that_do_not_join_are_counted_before_any_group_is_made(
    cuda: Cuda, device: torch.device | None, joining: int
) -> None:
    store = open_store(HOST, 4, LIMIT_S)
    first = Broadcast(lambda: store, 0, 4, LIMIT_S, device)
    joined = [
        Broadcast(partial(join_store, HOST, store.port, 4, LIMIT_S), engine, 4, LIMIT_S, device)
        for engine in range(1, joining + 1)
    ]
    with pytest.raises(TimeoutError, match=f"not all of 3 engines joined the weight broadcast in 0.4 s: {joining} did"):
        first.send(bytes_of(1, 2))()
    for other in joined:
        with pytest.raises(TimeoutError, match="not all of 3 engines joined"):
            other.receive(2).result(timeout=10)
    assert Nccl.made == []


def pair(cuda: Cuda) -> tuple[Broadcast, Broadcast]:
    store = open_store(HOST, 2, LIMIT_S)
    join = partial(join_store, HOST, store.port, 2, LIMIT_S)
    return tuple(  # type: ignore[return-value]
        Broadcast(where, member, 2, LIMIT_S, torch.device("cuda", member))
        for member, where in enumerate((lambda: store, join))
    )


def test_an_engine_that_is_gone_ends_the_learners_wait_by_name_and_its_group_is_aborted(cuda: Cuda) -> None:
    learner, engine = pair(cuda)
    arriving = engine.receive(2)
    learner.send(bytes_of(1, 2))()
    assert arriving.result(timeout=10).tolist() == [1, 2]
    # The engine has joined and dies: nobody takes the second bucket.
    with pytest.raises(TimeoutError, match=r"not broadcast to all of 1 engines in 0.4 s: one of them is gone or hangs"):
        learner.send(bytes_of(3, 4))()
    (group,) = (one for one in Nccl.made if one.rank == 0)
    assert group.aborted.is_set()


def test_a_learner_that_is_gone_leaves_the_bucket_missing_until_the_group_is_left(cuda: Cuda) -> None:
    learner, engine = pair(cuda)
    missing = engine.receive(2)
    until(lambda: any(group.used for group in Nccl.made))
    assert not missing.done()  # the engine's own limit names it (rollout.update)
    engine.close()
    with pytest.raises(RuntimeError, match="aborted"):
        missing.result(timeout=10)
    learner.close()


def test_a_receiver_of_a_new_group_leaves_the_one_it_hangs_in(cuda: Cuda) -> None:
    inbox, first, second = Inbox(), open_store(HOST, 2, 10.0), open_store(HOST, 2, 10.0)
    lost = Broadcast(lambda: first, 0, 2, 10.0, torch.device("cuda", 0))
    inbox.take("nccl", (HOST, first.port, 2, 1, 10.0), 2, ())
    until(lambda: len(Nccl.made) == 2)
    inbox.clear()
    sends = Broadcast(lambda: second, 0, 2, 10.0, torch.device("cuda", 0))
    inbox.take("nccl", (HOST, second.port, 2, 1, 10.0), 2, ())
    sends.send(bytes_of(5, 6))()
    until(inbox.all_arrived)
    assert [group.aborted.is_set() for group in Nccl.made if group.rank == 1] == [True, False]
    lost.close()


# ---------------------------------------------------------------- CUDA IPC


def flat_model() -> nn.Module:
    """As ZeRO-1/2 leaves it: the trained parameters are views of one padded buffer, in another order."""
    module = model()
    module[0].weight.requires_grad_(False)
    trained = [parameter for parameter in reversed(list(module.parameters())) if parameter.requires_grad]
    flat = torch.zeros(sum(parameter.numel() for parameter in trained) + 7)
    start = 0
    for parameter in trained:
        flat[start : start + parameter.numel()] = parameter.detach().flatten()
        parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    return module


def opened(bucket: WeightBucket) -> dict[str, Tensor]:
    inbox = Inbox()
    inbox.take("ipc", bucket.payload, bucket.nbytes, bucket.slots)
    assert inbox.all_arrived()
    return dict(inbox.tensors())


def test_by_ipc_every_rank_hands_its_flat_parameters_themselves_to_the_engine_on_its_gpu(cuda: Cuda) -> None:
    ranks = [flat_model() for _ in range(2)]
    senders = []
    for rank, module in enumerate(ranks):
        cuda.uuids = [f"GPU-{'ab'[rank]}"]  # each process sees its own GPU alone, as number 0
        senders.append(sender(module, "ipc", rank))
        assert senders[-1].open(("0.0", "1.0")) == 1
    for _ in range(3):
        handles = {}
        for rank, out in enumerate(senders):
            cuda.uuids = [f"GPU-{'ab'[rank]}"]
            bucket = out.fill_bucket(0)
            assert bucket is not None and (bucket.checksum is None) is (rank > 0)
            handles |= bucket.payload
            out.flush()
            out.release()
        for rank, module in enumerate(ranks):
            cuda.uuids = ["GPU-x", f"GPU-{'ab'[rank]}"]
            cuda.set_device(1)  # the same GPU under another number
            received = opened(WeightBucket(slots=bucket.slots, nbytes=bucket.nbytes, transport="ipc", payload=handles))
            trained = {name: one for name, one in module.named_parameters() if one.requires_grad}
            assert set(received) == set(trained) and len(received) == 9
            for name, parameter in trained.items():
                assert torch.equal(received[name], parameter)
                assert received[name].data_ptr() == parameter.data_ptr(), "nothing was copied"
            cuda.set_device(0)
        with torch.no_grad():
            ranks[0][2].weight += 1
            ranks[1][2].weight += 1
    assert len(Ipc.shared) == 2, "one handle a rank, however often it is used"
    assert bucket.nbytes == 4 * (4 * 60_000 + 5 * 200 + 7)


def test_an_engine_on_another_gpu_than_every_rank_is_told_so(cuda: Cuda) -> None:
    bucket = sender(flat_model(), "ipc").fill_bucket(0)
    assert bucket is not None
    cuda.uuids = ["GPU-z"]
    with pytest.raises(RuntimeError, match="ipc: weights lie on GPU GPU-a and this engine is on GPU GPU-z"):
        opened(bucket)


def test_what_is_not_there_as_the_engine_has_it_is_copied_and_stays_until_release(cuda: Cuda) -> None:
    """Merged adapters, as an example: base + 2 * up @ down."""
    base, down, up = (nn.Parameter(torch.randn(shape)) for shape in ((200, 700), (3, 700), (200, 3)))
    base.requires_grad_(False)
    named = {f"{i}.weight": Weight(base=base, adapters={"lora_A": down, "lora_B": up}, scaling=2.0) for i in range(4)}
    config = LearnerConfig(bucket_mb=1)
    out = WeightSender(named, config, rank=1, device=torch.device("cpu"), transport="ipc")
    buckets = [out.fill_bucket(index) for index in range(out.open(("0.0",)))]
    assert len(buckets) == 4
    for bucket in buckets:
        assert bucket is not None
        ((_, merged),) = opened(bucket).items()
        assert torch.allclose(merged, base + 2.0 * up @ down, atol=1e-5)
        assert merged.data_ptr() != base.data_ptr()
    assert len({storage(shared).data_ptr() for shared in Ipc.shared}) == 4
    out.release()
    assert out._buffers == {}
