"""The error of images that cannot be used."""


class UnusableError(Exception):
    """An image that cannot be used.

    Args:
        kind: Reason in a few words, under which the image is counted.
        detail: Details of this image.

    Attributes:
        address: Path or URL of the file, which may become usable as it is; empty if not known.
    """

    def __init__(self, kind: str, detail: object = ""):
        super().__init__(f"{kind} ({detail})" if str(detail) else kind)
        self.kind, self.address = kind, ""
