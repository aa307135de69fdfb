"""Arrays read back from an .npz, or one sentence: a later stage must not go on with damaged ones.

np.savez stores arrays uncompressed, each with its CRC-32. It is checked only when a member has been
read to its end, and numpy reads as many bytes as the array's header names: a damaged header could
make it read fewer, or ask for any amount of memory. Here a member must be stored, and exactly as
long as its header says.
"""

import zipfile

import numpy as np

from crate_mini import UserError

CHUNK = 1 << 20  # bytes


def arrays(path, again, names=None):
    """{name: array} of an .npz; names: only these.

    again: the end of the error sentence, what makes the file again. Raises UserError if the file
    or one of its arrays is missing or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            wanted = members if names is None else names
            return {name: _read(archive, members[name]) for name in wanted}
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


def _read(archive, info):
    """One array of an archive. Raises an exception unless all of it is intact."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise ValueError("compressed or encrypted, unlike what np.savez writes")
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
