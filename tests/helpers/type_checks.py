"""The run-time type checker of the tests."""

import io
from typing import BinaryIO

import numpy as np
from beartype import BeartypeConf, FrozenDict, beartype

from radiance.data.source import Source

# NumPy's scalars count as numbers, whole numbers as floats, and any binary stream as a file. Tests
# have data sources with a part of the methods.
OVERRIDES = {
    int: int | np.integer,
    float: float | int | np.floating | np.integer,
    BinaryIO: io.IOBase | BinaryIO,
    Source: object,
}
check_types = beartype(conf=BeartypeConf(hint_overrides=FrozenDict(OVERRIDES)))
