"""Accuracy for `evaluate`, which loads this file by path: a function of `hf_compress.tasks.metrics`."""

import datasets
import evaluate

from hf_compress.tasks.metrics import accuracy


class HfcAccuracy(evaluate.Metric):
    """Accuracy; see `hf_compress.tasks.metrics.accuracy`."""

    def _info(self):
        kind = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=str(self.__doc__),
            citation="",
            inputs_description=str(accuracy.__doc__),
            features=datasets.Features({"predictions": kind, "references": kind}),
        )

    def _compute(self, predictions, references):
        return {"accuracy": accuracy(predictions, references)}
