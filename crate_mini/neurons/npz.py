"""Arrays in an .npz, read back intact or refused in one sentence.

Each array has a CRC-32. It is checked only when a member has been read to its end, and numpy reads
as many bytes as the array's header names: a damaged header could make it read fewer, or ask for any
amount of memory. Here a member must be exactly as long as its header says, and no longer than its
compressed bytes can hold.

Activations are kept as `Halves`: float16 for each neuron times a power of two, so that none is too
large or too small for it.
"""

import zipfile
from typing import NamedTuple

import numpy as np

from crate_mini import UserError

CHUNK = 1 << 20  # bytes
DENSEST = 1040  # bytes that one byte can hold after zlib's compression
EXPONENT = ".exponent"  # ends the name of the powers of two that belong to an array
HALF_MAX = 15  # float16 holds 2^15, and nothing above 2^16


class Halves(NamedTuple):
    """Finite activations to be written as float16, with an exponent for each neuron.

    They come back as float32, exact to a share of 2^-11 of each, down to 2^-29 of the neuron's
    largest. axis: the one that runs over neurons.
    """

    values: np.ndarray
    axis: int

    def parts(self):
        """(float16 array, exponents int16): each value is its float16 times 2^exponent."""
        axes = tuple(i for i in range(self.values.ndim) if i != self.axis % self.values.ndim)
        largest = np.abs(self.values).max(axis=axes, keepdims=True, initial=0)
        exponents = np.where(largest > 0, np.frexp(largest)[1] - HALF_MAX, 0)
        return np.ldexp(self.values, -exponents).astype(np.float16), exponents.astype(np.int16)

    def read(self):
        """The values as they come back from the file."""
        return whole(*self.parts())


def whole(halves, exponents):
    """float32 values of the parts of Halves."""
    return np.ldexp(halves.astype(np.float32), exponents.astype(np.int32))


def write(file, content):
    """Write {name: array or Halves} to an open binary file, lightly compressed."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in content.items():
            if isinstance(array, Halves):
                array, exponents = array.parts()
                _write_member(archive, name + EXPONENT, exponents)
            _write_member(archive, name, array)


def _write_member(archive, name, array):
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


def arrays(path, again, names=None):
    """{name: array} of an .npz; names: only these.

    again: the end of the error sentence, what makes the file again. Raises UserError if the file
    or one of its arrays is missing or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            chosen = members if names is None else names
            wanted = [name for name in chosen if not name.endswith(EXPONENT)]
            return {name: _read_whole(archive, members, name) for name in wanted}
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {again}.") from None
    except OSError as error:
        if error.filename is None:  # not from the system: a damaged place in the file
            raise UserError(f"{path} is damaged; {again}.") from None
        raise UserError(f"Cannot read {path}: {error.strerror}; {again}.") from None
    except MemoryError:
        raise
    except Exception:  # whatever the zip reader makes of a damaged byte
        raise UserError(f"{path} is damaged; {again}.") from None


def _read_whole(archive, members, name):
    """One array of an archive, with its exponents if it was written as Halves."""
    array = _read(archive, members[name])
    if name + EXPONENT in members:
        return whole(array, _read(archive, members[name + EXPONENT]))
    return array


def _read(archive, info):
    """One array of an archive. Raises an exception unless all of it is intact."""
    known = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    if info.compress_type not in known or info.flag_bits & 1:
        raise ValueError("encrypted, or compressed unlike what `write` writes")
    if info.file_size > DENSEST * info.compress_size:
        raise ValueError("longer than its compressed bytes can hold")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read_header = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read_header = np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read_header(member)
        count = int(np.prod(shape, dtype=object))
        if dtype.hasobject or min(shape, default=0) < 0:
            raise ValueError("no plain array")
        if count * dtype.itemsize != info.file_size - member.tell():
            raise ValueError("another length than its header names")
        values = np.empty(count, dtype)
        place = values.data.cast("B") if count else memoryview(b"")
        for start in range(0, len(place), CHUNK):
            block = member.read(min(CHUNK, len(place) - start))
            place[start : start + len(block)] = block
    return values.reshape(shape, order="F" if by_columns else "C")
