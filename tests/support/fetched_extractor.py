"""A feature extractor that is small and has to be fetched."""

from ditune.metrics import EfficientNetLite0
from ditune.metrics.features import weights_need


class Fetched(EfficientNetLite0):
    """EfficientNet-Lite0 under the address of Inception."""

    @classmethod
    def needs(cls, config, addresses):
        return [weights_need("inception", "the feature extractor", config, addresses)]
