"""Torch tensors to frames and back: type, dtype, shape, strides, bits and what they share with each other arrive."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from codec_receiver import check_same, copied, random_bits, sent_bytes, shares

from ray_shm.codec import OUT_OF_BAND_BYTES, decode, encode

WATCHDOG = 60.0  # seconds; only a hang comes near
DTYPES = sorted({v for v in vars(torch).values() if isinstance(v, torch.dtype)}, key=str)
QUANTIZED = [d for d in DTYPES if str(d).startswith(("torch.qint", "torch.quint"))]
PLAIN = [d for d in DTYPES if d not in QUANTIZED]
KNOWN_WARNINGS = ["ComplexHalf support", "torch.quantize_per_tensor", "The PyTorch API of nested", "Sparse"]
KNOWN_WARNINGS += ["TypedStorage is deprecated"]  # of torch's own rebuilding of quantized tensors
pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in KNOWN_WARNINGS]
pytestmark.append(pytest.mark.filterwarnings("error:The given buffer is not writable"))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (3,), (90, 101)], ids=str)
def test_every_dtype_and_shape(shape: tuple[int, ...]) -> None:
    for dtype in PLAIN:
        sent = random_bits(shape, dtype)
        received = copied(sent)
        check_same(received, sent)
        assert received.stride() == sent.stride()
        received.untyped_storage().fill_(0)
        if sent.nbytes >= OUT_OF_BAND_BYTES:
            assert len(encode(sent)) == 2, dtype
            assert sent_bytes(sent) < sent.nbytes + 300


def test_all_the_dtypes_that_are_asked_for_are_among_those_tested() -> None:
    names = {str(dtype).removeprefix("torch.") for dtype in PLAIN}
    floats = {"bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "complex32"}
    assert floats | {"complex64", "complex128", "bool", "uint16", "uint32", "uint64"} <= names


FLAT = torch.arange(5000)
MATRIX = torch.arange(6000.0).reshape(60, 100)
IMAGES = torch.arange(2 * 3 * 20 * 30.0).reshape(2, 3, 20, 30)
STRIDED = {
    "transposed": MATRIX.t(),
    "channels last": IMAGES.to(memory_format=torch.channels_last),
    "permuted": IMAGES.permute(2, 0, 3, 1),
    "expanded": torch.arange(4.0).reshape(4, 1).expand(4, 3000),
    "expanded scalar": torch.tensor(3.0).expand(50, 60),
    "windows": torch.arange(2000.0).unfold(0, 100, 10),
}


@pytest.mark.parametrize("name", STRIDED)
def test_tensors_that_cover_their_memory_keep_their_strides_and_are_not_copied_together(name: str) -> None:
    sent = STRIDED[name]
    received = copied(sent)
    check_same(received, sent)
    assert received.stride() == sent.stride()
    assert sent_bytes(sent) < sent.untyped_storage().nbytes() + 300
    received.untyped_storage().fill_(0)


def test_a_huge_expanded_tensor_costs_its_elements_only() -> None:
    sent = torch.tensor([1.5, 2.5]).expand(1 << 33, 2)  # 128 GiB, were it copied together
    assert sent_bytes(sent) < 300
    received = copied(sent)
    assert (received.shape, received.stride()) == (sent.shape, (0, 1))
    assert received[1 << 32].tolist() == [1.5, 2.5]


@pytest.mark.parametrize(
    "view",
    [lambda m: m[::2, ::3], lambda m: m[:, 7], lambda m: m[:, :50], lambda m: m[10:20, 5:].t()],
    ids=["steps", "column", "half", "transposed block"],
)
def test_tensors_with_gaps_are_copied_together(view: Callable[[Any], Any]) -> None:
    sent = view(MATRIX)
    received = copied(sent)
    check_same(received, sent)
    assert received.is_contiguous()
    assert sent_bytes(sent) < sent.nbytes + 300


def test_a_slice_takes_its_own_bytes_along_and_not_its_storages() -> None:
    storage = torch.zeros(10_000_000)
    sent = storage[5_000_000 : 5_000_000 + 2000]
    assert sent_bytes(sent) < sent.nbytes + 300
    assert copied(sent).untyped_storage().nbytes() == sent.nbytes


# ---- flags, subclasses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 5000])
def test_a_leaf_that_requires_grad_arrives_as_one(count: int) -> None:
    sent = torch.arange(float(count), requires_grad=True)
    received = copied(sent)
    check_same(received, sent)
    assert received.is_leaf
    (received * 2).sum().backward()
    assert torch.equal(received.grad, torch.full((count,), 2.0))
    assert sent.grad is None


def test_a_result_of_autograd_arrives_as_a_leaf_without_its_history() -> None:
    """As from torch.save."""
    weight = torch.ones(2000, requires_grad=True)
    sent = weight * 3
    received = copied(sent)
    assert received.is_leaf
    assert received.requires_grad
    assert torch.equal(received, sent)
    file = io.BytesIO()
    torch.save(sent, file)
    file.seek(0)
    saved = torch.load(file)
    assert (saved.is_leaf, saved.requires_grad) == (received.is_leaf, received.requires_grad)


def test_hooks_are_left_behind_with_a_warning() -> None:
    sent = torch.ones(3, requires_grad=True)
    sent.register_hook(lambda grad: grad * 2)
    with pytest.warns(UserWarning, match="hook"):
        received = copied(sent)
    received.sum().backward()
    assert received.grad.tolist() == [1, 1, 1]


@pytest.mark.parametrize("count", [3, 5000])
def test_conjugate_and_negative_bits_are_kept(count: int) -> None:
    values = torch.arange(count) * (1 + 2j)
    for sent in (values.conj(), values.conj().imag, values.imag, values.conj().conj(), values.conj()[1::2]):
        received = copied(sent)
        check_same(received, sent)
        assert (received.is_conj(), received.is_neg()) == (sent.is_conj(), sent.is_neg())
    assert values.conj().is_conj()
    assert values.conj().imag.is_neg()


@pytest.mark.parametrize("requires_grad", [True, False])
def test_parameters(requires_grad: bool) -> None:
    sent = torch.nn.Parameter(torch.arange(5000.0), requires_grad=requires_grad)
    received = copied(sent)
    check_same(received, sent)
    assert received.is_leaf
    assert len(encode(sent)) == 2


def test_a_module_and_its_state() -> None:
    torch.manual_seed(1)
    sent = torch.nn.Sequential(torch.nn.Linear(50, 60), torch.nn.BatchNorm1d(60), torch.nn.Linear(60, 60))
    sent[2].weight = torch.nn.Parameter(torch.randn(60, 60))
    sent.append(torch.nn.Linear(60, 60))
    sent[3].weight = sent[2].weight
    received = copied(sent)
    assert received.state_dict().keys() == sent.state_dict().keys()
    for name, tensor in sent.state_dict().items():
        assert torch.equal(received.state_dict()[name], tensor)
    assert received[3].weight is received[2].weight, "tied"
    inputs = torch.randn(4, 50)
    assert torch.equal(received.eval()(inputs), sent.eval()(inputs))


def test_attributes_of_tensors_and_parameters_travel() -> None:
    for make in (torch.Tensor.clone, torch.nn.Parameter):
        sent = make(torch.arange(2000.0))
        sent.output_dim = 1
        sent.itself = sent
        received = copied(sent)
        assert type(received) is type(sent)
        assert received.output_dim == 1
        assert received.itself is received
        assert torch.equal(received, sent)


class Named(torch.Tensor):
    """Attributes are all that it adds."""

    label: str


class Stated(torch.Tensor):
    def __getstate__(self) -> Any:
        return {"packed": self.label}  # type: ignore[attr-defined]

    def __setstate__(self, state: Any) -> None:
        self.label = state["packed"] + "!"


class Slotted(torch.Tensor):
    __slots__ = ("label",)


class Weight(torch.nn.Parameter):
    label: str


class OwnReduce(torch.Tensor):
    def __reduce_ex__(self, protocol: Any) -> Any:
        return _own_reduce_rebuilt, (self.as_subclass(torch.Tensor) + 1,)


def _own_reduce_rebuilt(tensor: Any) -> Any:
    return tensor.as_subclass(OwnReduce)


class Forbidding(torch.Tensor):
    """Lets no operation through."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"no operation may run: {func}")


@pytest.mark.parametrize("cls", [Named, Slotted, Weight])
def test_subclasses_keep_type_and_attributes_and_go_out_of_band(cls: Any) -> None:
    base = torch.arange(100_000.0)
    sent = base[:2000].as_subclass(cls) if cls is not Weight else Weight(base[:2000])
    sent.label = "kept"
    assert len(encode(sent)) == 2
    assert sent_bytes(sent) < sent.nbytes + 800
    received = copied(sent)
    assert type(received) is cls
    assert received.label == "kept"
    assert received.requires_grad == sent.requires_grad
    assert torch.equal(received.detach().as_subclass(torch.Tensor), base[:2000])


def test_subclasses_with_a_pickling_of_their_own() -> None:
    base = torch.arange(2000.0)
    sent = base.as_subclass(Stated)
    sent.label = "kept"
    assert copied(sent).label == "kept!"
    received = copied(base.as_subclass(OwnReduce))
    assert type(received) is OwnReduce
    assert torch.equal(received.as_subclass(torch.Tensor), base + 1)


def test_no_operation_of_a_subclass_runs_while_it_is_pickled() -> None:
    base = torch.arange(2000.0)
    received = copied(base.as_subclass(Forbidding))
    with torch._C.DisableTorchFunctionSubclass():
        assert type(received) is Forbidding
        assert torch.equal(received.as_subclass(torch.Tensor), base)


def test_a_subclass_shares_memory_with_a_plain_tensor() -> None:
    base = torch.arange(2000.0)
    a, b = copied([base[5:].as_subclass(Named), base])
    b[5] = -1
    assert a[0] == -1


MAIN = """
import pickle, sys, torch
from ray_shm.codec import encode

class Mine(torch.Tensor):
    def doubled(self): return (self * 2).as_subclass(torch.Tensor)

tensor = torch.arange(3000.0)
sent = tensor.as_subclass(Mine)
sent.label = "kept"
sys.stdout.buffer.write(pickle.dumps([bytes(frame) for frame in encode([sent, tensor[7:], lambda: tensor])]))
"""


def test_subclasses_of_main_and_tensors_beside_them() -> None:
    done = subprocess.run([sys.executable, "-c", MAIN], capture_output=True, timeout=WATCHDOG)
    assert done.returncode == 0, done.stderr.decode()
    mine, view, function = decode(pickle.loads(done.stdout))
    assert mine.label == "kept"
    assert torch.equal(mine.doubled(), torch.arange(3000.0) * 2)
    assert torch.equal(view, torch.arange(7.0, 3000.0))
    assert shares(mine, view)
    assert torch.equal(function(), torch.arange(3000.0))


# ---- what torch pickles itself --------------------------------------------------------------------------------------

SPARSE: dict[str, Callable[[Any], Any]] = {
    "COO": lambda t: t.to_sparse(),
    "CSR": lambda t: t.to_sparse_csr(),
    "CSC": lambda t: t.to_sparse_csc(),
    "BSR": lambda t: t.to_sparse_bsr((2, 2)),
}


@pytest.mark.parametrize("layout", SPARSE)
def test_sparse_tensors(layout: str) -> None:
    dense = torch.eye(1200) * torch.arange(1200)
    sent = SPARSE[layout](dense)
    received = copied(sent)
    assert (received.layout, received.dtype, received.shape) == (sent.layout, sent.dtype, sent.shape)
    assert torch.equal(received.to_dense(), dense)
    assert len(encode(sent)) > 1, "indices and values go out of band"


def test_an_uncoalesced_sparse_tensor_stays_so() -> None:
    sent = torch.sparse_coo_tensor(torch.tensor([[0, 0, 1]]), torch.tensor([1.0, 2.0, 3.0]), (4,))
    received = copied(sent)
    assert not received.is_coalesced()
    assert received.to_dense().tolist() == [3, 3, 0, 0]


def test_quantized_tensors() -> None:
    values = torch.linspace(-1, 1, 6000).reshape(60, 100)
    scales, zeros = torch.linspace(0.1, 1, 60, dtype=torch.float64), torch.zeros(60, dtype=torch.int64)
    for dtype in (torch.qint8, torch.quint8, torch.qint32):
        for sent in (
            torch.quantize_per_tensor(values, 0.02, 3, dtype),
            torch.quantize_per_channel(values, scales, zeros, 0, dtype),
        ):
            received = copied(sent)
            assert (received.dtype, received.qscheme(), received.shape) == (sent.dtype, sent.qscheme(), sent.shape)
            assert torch.equal(received.int_repr(), sent.int_repr())
            assert torch.equal(received.dequantize(), sent.dequantize())
            assert len(encode(sent)) == 2, "out of band"


def test_nested_tensors() -> None:
    parts = [torch.arange(3000.0), torch.arange(5.0)]
    for layout in (torch.strided, torch.jagged):
        received = copied(torch.nested.nested_tensor(parts, layout=layout))
        assert received.is_nested
        assert all(torch.equal(a, b) for a, b in zip(received.unbind(), parts, strict=True))


def test_meta_tensors_stay_without_memory() -> None:
    sent = torch.empty_strided((1 << 20, 1 << 20), (1, 1 << 20), dtype=torch.bfloat16, device="meta")
    received = copied(sent)
    assert received.is_meta
    assert (received.dtype, received.shape, received.stride()) == (sent.dtype, sent.shape, sent.stride())
    parameter = copied(torch.nn.Parameter(sent))
    assert parameter.is_meta
    assert type(parameter) is torch.nn.Parameter


def test_storages() -> None:
    tensor = torch.arange(3000, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TypedStorage is deprecated
        typed = copied(tensor.storage())
        assert isinstance(typed, torch.TypedStorage)
        assert typed.tolist() == tensor.tolist()
    untyped = copied(tensor.untyped_storage())
    assert bytes(untyped) == bytes(tensor.untyped_storage())
    assert len(encode(tensor.untyped_storage())) == 2
    assert copied(torch.UntypedStorage(0)).nbytes() == 0


def test_dtypes_devices_sizes_and_generators() -> None:
    sent = [torch.bfloat16, torch.device("cuda:3"), torch.Size([1, 2]), torch.strided, torch.channels_last]
    received = copied(sent)
    assert received == sent
    assert type(received[2]) is torch.Size


def test_what_torch_refuses_is_an_error_and_the_next_message_is_right() -> None:
    mapped: list[Any] = []

    def f(x: Any) -> Any:
        try:
            encode(x)
        except RuntimeError as exc:
            mapped.append(exc)
        return x

    torch.vmap(f)(torch.ones(3, 5))
    assert mapped, "a tensor inside of vmap has no memory of its own"
    assert torch.equal(copied(MATRIX), MATRIX)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, lambda: torch.device("meta")])
def test_contexts_of_sender_and_receiver_change_nothing(context: Any) -> None:
    """Models are often made inside of ``with torch.device("meta")``."""
    sent = [MATRIX, FLAT[3:], FLAT, torch.nn.Parameter(torch.ones(3)), torch.empty(0), MATRIX.t()]
    frames = [bytes(frame) for frame in encode(sent)]
    with context():
        inside = decode([bytes(frame) for frame in encode(sent)])
        received = decode(frames)
    for got in (inside, received):
        for tensor, original in zip(got, sent, strict=True):
            check_same(tensor, original)


# ---- importing ------------------------------------------------------------------------------------------------------

LATE = """
import sys
from ray_shm.codec import decode, encode
import numpy as np

class Other: pass
assert decode(encode([np.arange(9000), {1: 2}]))[1] == {1: 2}
assert "torch" not in sys.modules and "pandas" not in sys.modules and "pyarrow" not in sys.modules
import torch
tensor = torch.arange(3000)
assert len(encode(tensor)) == 2
assert torch.equal(decode(encode(tensor)), tensor)
"""


def test_the_codec_imports_torch_only_where_there_is_a_tensor() -> None:
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, timeout=WATCHDOG)
    assert done.returncode == 0, done.stderr


def test_a_receiver_without_torch_yet_imports_it() -> None:
    frames = [bytes(frame) for frame in encode([MATRIX, MATRIX[3:]])]
    code = "import sys, pickle; from ray_shm.codec import decode; assert 'torch' not in sys.modules; "
    code += "a, b = decode(pickle.loads(sys.stdin.buffer.read())); print(a.sum().item(), b.shape)"
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(frames), capture_output=True, timeout=WATCHDOG
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == f"{MATRIX.sum().item()} torch.Size([57, 100])\n"
