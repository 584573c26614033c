"""Safetensors files with types that the library's writer for NumPy does not have."""

import json
import struct

NAMES = {"uint8": "U8", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float32": "F32"}


def write(path, tensors):
    header, end = {}, 0
    for name, array in tensors.items():
        offsets = [end, end := end + array.nbytes]
        header[name] = {"dtype": NAMES[array.dtype.name], "shape": array.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(array.tobytes() for array in tensors.values()))
