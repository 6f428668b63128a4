"""PLACEHOLDER, to be overwritten."""

import hashlib
import os

from pipeline.tables.storage import read_text, write_atomically


def read_versioned(path):
    if not os.path.exists(path):
        return "", ""
    text = read_text(path)
    return text, hashlib.sha256(text.encode()).hexdigest()


def replace_if(path, text, version):
    if read_versioned(path)[1] != version:
        return False
    write_atomically(path, text)
    return True
