"""Exact match and F1 of SQuAD for `evaluate`, which loads this file by path: `hf_compress.tasks.squad.squad_scores`."""

import datasets
import evaluate


class HfcSquad(evaluate.Metric):
    """Exact match and F1, in points; see `hf_compress.tasks.squad.squad_scores`.

    Predictions are {"id", "prediction_text"}, references {"id", "answers": {"text": [...], "answer_start": [...]}}.
    """

    def _info(self):
        text = datasets.Value("string")
        answers = {"text": datasets.List(text), "answer_start": datasets.List(datasets.Value("int32"))}
        return evaluate.MetricInfo(
            description=str(self.__doc__),
            citation="",
            inputs_description="",
            features=datasets.Features(
                {
                    "predictions": {"id": text, "prediction_text": text},
                    "references": {"id": text, "answers": answers},
                }
            ),
        )

    def _compute(self, predictions, references):
        from hf_compress.tasks.squad import squad_scores

        return squad_scores(
            {row["id"]: row["prediction_text"] for row in predictions},
            {row["id"]: row["answers"]["text"] for row in references},
        )
