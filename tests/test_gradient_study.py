"""What the gradients of several steps have in common, and where the study keeps it."""

import pytest
import torch

from tiny import generator_study, gradient_study, results
from tiny.dataset import write_tiny


def test_agreement_is_the_mean_cosine_with_the_others():
    same, opposite = torch.tensor([1.0, 2.0]), torch.tensor([-1.0, -2.0])
    assert gradient_study.agreement(torch.stack([same, 3 * same])).tolist() == pytest.approx([1, 1], abs=1e-6)
    found = gradient_study.agreement(torch.stack([same, same, opposite])).tolist()
    assert found == pytest.approx([0, 0, -1], abs=1e-6)


def test_the_study_reads_gradients_of_each_loss_from_its_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "RECORDS", tmp_path)
    monkeypatch.setattr(generator_study, "STUDY", tmp_path / "study")
    for module in (generator_study, gradient_study):
        monkeypatch.setattr(module, "DATASET", tmp_path / "dataset")
    write_tiny(tmp_path / "dataset", 4, 4)
    small = "--group 2 --batch 2 --size 64 --micro 4 --readings 1 --sample-steps 2 --device cpu".split()
    assert gradient_study.main(["--runs", "2", *small]) == 0
    rows = results.rows_of("gradients")
    assert list(rows) == list(gradient_study.ROWS)
    for runs in rows.values():
        (records,) = runs.values()
        assert len(records) == 2 and all(-1 <= record["agreement"] <= 1 for record in records)
        assert records[0]["agreement"] == records[1]["agreement"]  # of two, each has the other's
    assert "finite differences" in capsys.readouterr().out
