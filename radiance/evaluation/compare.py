"""Generated pictures against real ones, in numbers that say what they were measured with and on how many pictures."""

from radiance.evaluation.distances import SUBSETS, frechet_distance, kernel_distance, moments, precision_recall
from radiance.evaluation.features import Features

LEAST = 2 * SUBSETS  # pictures of either kind


def compare_features(generated: Features, real: Features, name: str) -> dict[str, float]:
    """The Fréchet distance and KID (lower is better), and precision and recall (higher is better), each under the name of its features.

    Raises DataError for fewer than 20 pictures of either kind.
    """
    kernel = kernel_distance(generated, real)
    coverage = precision_recall(generated, real)
    return {
        f"FD({name})": frechet_distance(moments([generated]), moments([real])),
        f"KID({name})": kernel.value,
        f"KID({name}) standard error": kernel.error,
        f"precision({name})": coverage.precision,
        f"recall({name})": coverage.recall,
        "generated pictures": len(generated),
        "real pictures": len(real),
    }
