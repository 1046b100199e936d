"""Matthews correlation for `evaluate`, which loads this file by path: a function of `hf_compress.tasks.metrics`."""

import datasets
import evaluate

from hf_compress.tasks.metrics import matthews_correlation


class HfcMatthewsCorrelation(evaluate.Metric):
    """Matthews correlation; see `hf_compress.tasks.metrics.matthews_correlation`."""

    def _info(self):
        kind = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=str(self.__doc__),
            citation="",
            inputs_description=str(matthews_correlation.__doc__),
            features=datasets.Features({"predictions": kind, "references": kind}),
        )

    def _compute(self, predictions, references):
        return {"matthews_correlation": matthews_correlation(predictions, references)}
