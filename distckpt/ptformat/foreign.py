"""What a file is that is sound, and is no checkpoint that can be read: for the error that says so.

Owns the signs of other formats. Must not know how checkpoints are read.
"""

import struct

from distckpt.ptformat.verify import Archive, record_bytes
from distckpt.storage.base import Readable

__all__ = ["format_of"]

_NEWEST_PROTOCOL = 3
_PROTO = 0x80
_LENGTH = struct.Struct("<Q")
_SIGNS = (
    (0, b"\x93NUMPY", "a NumPy array: numpy.load reads it"),
    (0, b"\x89HDF\r\n", "an HDF5 file: h5py reads it"),
    (257, b"ustar", "a tar archive"),
)
_BEGIN_BYTES = 512


def format_of(file: Readable, archive: Archive | None) -> str | None:
    """Return what a file is instead of a checkpoint that can be read, and what to do; None where that is not known.

    Args:
        file: open for reading.
        archive: what its directory says, if it is a zip archive.

    Raises:
        OSError: it cannot be read.
    """
    return _format_of_begin(file) if archive is None else _format_of_archive(file, archive)


def _format_of_archive(file: Readable, archive: Archive) -> str | None:
    names = [slot.name.rpartition("/")[2] for slot in archive.slots]
    if "constants.pkl" in names:
        return "a TorchScript program: torch.jit.load reads it, and what that executes is the file's own code"
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive (.npz): numpy.load reads it"
    if "data.pkl" in names:
        number = names.index("data.pkl")
        try:
            begin = record_bytes(file, archive.slots[number], archive.inflated.get(number))[:2]
        except ValueError:
            return None
        if len(begin) > 1 and begin[0] == _PROTO and begin[1] > _NEWEST_PROTOCOL:
            return (
                f"a checkpoint whose pickle is of protocol {begin[1]}: torch's reader that executes nothing knows "
                f"none above {_NEWEST_PROTOCOL}. Save it with torch.save's default, pickle_protocol=2"
            )
    return None


def _format_of_begin(file: Readable) -> str | None:
    begin = file.read(0, _BEGIN_BYTES)
    for at, sign, told in _SIGNS:
        if begin[at : at + len(sign)] == sign:
            return told
    if len(begin) > _LENGTH.size and begin[_LENGTH.size] == ord("{"):  # the length of JSON, then JSON
        (length,) = _LENGTH.unpack_from(begin)
        if length + _LENGTH.size <= file.num_bytes and file.read(_LENGTH.size, length).rstrip()[-1:] == b"}":
            return "a safetensors file: safetensors.torch.load_file reads it"
    return None
