"""F1 for `evaluate`, which loads this file by path: a function of `hf_compress.tasks.metrics`."""

import datasets
import evaluate

from hf_compress.tasks.metrics import f1


class HfcF1(evaluate.Metric):
    """F1; see `hf_compress.tasks.metrics.f1`."""

    def _info(self):
        kind = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=str(self.__doc__),
            citation="",
            inputs_description=str(f1.__doc__),
            features=datasets.Features({"predictions": kind, "references": kind}),
        )

    def _compute(self, predictions, references, average="binary"):
        return {"f1": f1(predictions, references, average)}
