import numpy as np

from radiance.base.hashing import hash_parts


def test_hashes_of_values_are_stable():
    """Embedding caches store them."""
    assert hash_parts("hash", 8) == "596c8b07df9c861a1e91f53d25bcd1e9"


def test_hashes_of_arrays_depend_on_content_type_and_shape():
    array = np.arange(2000, dtype=np.float32)
    others = [array.reshape(2, 1000), array.astype(np.float64), array[::-1], array.tolist()]
    hashes = {hash_parts(other) for other in (array, *others)}
    assert len(hashes) == 5
    assert hash_parts(array) == hash_parts(array.copy())
