"""What comes in is checked at the door: shapes, dtypes, owners of arrays, and the words of the errors."""

import pickle
import sys
from types import ModuleType

import numpy as np
import pytest

from qattn import _check, errors
from qattn._backend import as_array, as_numpy, is_cupy


class Device:
    """An array on a device of a given DLPack type."""

    def __init__(self, kind):
        self.kind = kind

    def __dlpack_device__(self):
        return self.kind, 0

    def __dlpack__(self, **_):
        raise BufferError("not asked for the data of another device")


def test_numpy_arrays_pass_as_they_are():
    x = np.ones(3)
    assert as_numpy(x) is x


def test_array_protocol_comes_before_dlpack():
    class Both(Device):
        def __array__(self, dtype=None, copy=None):
            return np.arange(3)

    np.testing.assert_array_equal(as_numpy(Both(1)), [0, 1, 2])
    np.testing.assert_array_equal(as_numpy(Both(3)), [0, 1, 2])


def test_array_on_a_gpu_is_told_how_to_copy_it():
    with pytest.raises(errors.DeviceError, match=r"x is on a GPU, and is needed on the CPU: cupy.asnumpy"):
        as_numpy(Device(2))


def test_array_on_a_gpu_needs_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(
        errors.DeviceError, match=r"x is on a GPU, and CuPy is not installed: pip install 'qattn\[cuda\]'"
    ):
        as_array(Device(2))


def test_array_on_an_unknown_device_is_named():
    with pytest.raises(errors.DeviceError, match="weights is on a device of DLPack type 8; copy it to the CPU"):
        as_numpy(Device(8), "weights")


def test_cupy_array_is_recognized_without_importing_cupy(monkeypatch):
    cupy = ModuleType("cupy")
    cupy.ndarray = type("ndarray", (), {})
    array = cupy.ndarray()
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    assert not is_cupy(array)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert is_cupy(array) and not is_cupy(np.ones(3))
    with pytest.raises(errors.DeviceError, match="data is on a GPU"):
        as_numpy(array, "data")


@pytest.mark.parametrize(
    ("shape", "expected", "message"),
    [
        ((4, 575), ("tokens", 576), r"x has shape \(4, 575\); expected \(tokens, 576\)"),
        ((576,), ("tokens", 576), r"x has shape \(576,\); expected \(tokens, 576\)"),
        ((4, 4), (4,), r"x has shape \(4, 4\); expected \(4,\)"),
    ],
)
def test_wrong_shape_is_shown_beside_the_expected_one(shape, expected, message):
    with pytest.raises(ValueError, match=message):
        _check.shape("x", np.empty(shape), expected)


def test_words_in_a_shape_stand_for_any_length():
    _check.shape("x", np.empty((0, 576)), ("tokens", 576))


def test_wrong_dtype_names_the_allowed_ones():
    _check.dtype("x", np.empty(3, "f2"), ["f4", "f2"])
    with pytest.raises(ValueError, match="x has dtype int64; expected float32 or float16"):
        _check.dtype("x", np.empty(3, "i8"), ["f4", "f2"])


def test_wrong_choice_lists_the_options():
    _check.choice("precision", "exact", ["int8", "exact"])
    with pytest.raises(ValueError, match="precision is 'int4'; expected one of 'int8', 'exact'"):
        _check.choice("precision", "int4", ["int8", "exact"])


def test_small_number_and_no_number_are_told_apart():
    _check.at_least("layer", np.int64(0), 0)
    with pytest.raises(ValueError, match="layer is -1; expected at least 0"):
        _check.at_least("layer", -1, 0)
    for wrong in (1.0, True, "1"):
        with pytest.raises(TypeError, match="expected an integer"):
            _check.at_least("layer", wrong, 0)


@pytest.mark.parametrize("name", ["FormatError", "GGUFError", "DeviceError", "CacheError"])
def test_errors_are_value_errors_of_qattn(name):
    error = getattr(errors, name)
    assert issubclass(error, ValueError) and issubclass(error, errors.QattnError)


def test_missing_extra_names_the_command_that_installs_it():
    error = errors.MissingExtraError("models", "tokenizers")
    assert isinstance(error, ImportError)
    assert str(error) == "tokenizers is not installed; get it with: pip install 'qattn[models]'"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
