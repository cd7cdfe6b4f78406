"""Lightning and transformers really train to a budget, resume, and lower."""

import importlib
import sys

import pytest
import torch
from torch.utils.data import DataLoader

from cgmq_fx.errors import UsageError
from cgmq_fx.prepare import prepare
from checkpoint_runs import differing, tensors_of

# What these libraries say of their own and each other's parts.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return importlib.import_module("lightning_digits")


@pytest.fixture(scope="module")
def majority():
    return importlib.import_module("transformers_majority")


class Lightning:
    """A run of a few epochs on a part of the digits."""

    def __init__(self, digits, folder, budget="1%"):
        from cgmq_fx.integrations.lightning import QuantizationCallback

        self.digits, self.folder = digits, folder
        train = torch.utils.data.Subset(digits.digits()[0], range(300))
        self.loader = DataLoader(train, 50)
        self.callback = QuantizationCallback(budget, example_inputs=(train[0][0][None],))

    def fit(self, epochs=4, stop_after=None, checkpoint=None):
        lightning = self.digits.lightning
        stop = lightning.Callback()
        if stop_after is not None:
            stop.on_train_epoch_end = lambda trainer, module: setattr(
                trainer, "should_stop", trainer.current_epoch + 1 >= stop_after
            )
        lightning.seed_everything(0, verbose=False)
        self.trainer = lightning.Trainer(
            max_epochs=epochs, callbacks=[stop, self.callback], accelerator="cpu", logger=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=self.folder,
        )  # fmt: skip
        self.trainer.fit(self.digits.Classifier(), self.loader, ckpt_path=checkpoint)
        return self


class TestLightning:
    def test_the_example(self, digits, capsys):
        assert digits.main(["--epochs", "6"]) > 0.85
        assert "within budget" in capsys.readouterr().out

    def test_it_resumes_as_if_it_had_not_stopped(self, digits, tmp_path):
        whole = Lightning(digits, tmp_path).fit()
        logged = whole.trainer.logged_metrics
        assert 0 < logged["cgmq/bops_of_budget"] <= 1
        assert logged["cgmq/bits/0_weight_"] == whole.callback.prepared.bit_widths["0_weight_"]
        half = Lightning(digits, tmp_path).fit(stop_after=1)
        assert half.trainer.current_epoch == 1
        path = tmp_path / "half.ckpt"
        half.trainer.save_checkpoint(path)
        rest = Lightning(digits, tmp_path).fit(checkpoint=path)
        found, expected = rest.callback.prepared, whole.callback.prepared
        assert differing(tensors_of(found), tensors_of(expected)) == []
        assert rest.callback.fixed.bit_widths == whole.callback.fixed.bit_widths
        with pytest.raises(UsageError, match=r"budget differs: saved 'bops: 1 %.*given 'bops: 2 %"):
            Lightning(digits, tmp_path, "2%").fit(checkpoint=path)
        with pytest.raises(UsageError, match=r"the guide differs: .*'total_steps': 24.*: 30"):
            Lightning(digits, tmp_path).fit(epochs=5, checkpoint=path)

    def test_wrong_arguments_are_named(self, digits, tmp_path):
        run = Lightning(digits, tmp_path)
        run.callback.attribute = "net"
        with pytest.raises(UsageError, match="Classifier has no network 'net', it is NoneType"):
            run.fit()
        run = Lightning(digits, tmp_path, None)
        with pytest.raises(UsageError, match=r"Classifier\.model is a float model; give"):
            run.fit()
        run = Lightning(digits, tmp_path)
        run.callback.optimizer = 1
        with pytest.raises(UsageError, match=r"optimizer=1\): Classifier configures 1 optimizer"):
            run.fit()


def transformers_run(majority, folder, callback, budget="3%", checkpoint=None):
    torch.manual_seed(0)
    example = {"input_ids": majority.Majority(2, 2).tokens}
    prepared = prepare(majority.network(), budget, example_inputs=example)
    trainer = majority.trainer_of(prepared, str(folder), 12, callback)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer, prepared


class TestTransformers:
    def test_the_example(self, majority, capsys):
        assert majority.main(["--steps", "150"]) > 0.8
        assert "within budget" in capsys.readouterr().out

    def test_it_resumes_as_if_it_had_not_stopped(self, majority, tmp_path):
        from cgmq_fx.integrations.transformers import QuantizationCallback

        first, second = QuantizationCallback(), QuantizationCallback()
        trainer, whole = transformers_run(majority, tmp_path, first)
        assert 0 < trainer.state.log_history[-1]["cgmq/bops_of_budget"] <= 1
        half = str(tmp_path / "checkpoint-6")
        _, rest = transformers_run(majority, tmp_path, second, checkpoint=half)
        assert differing(tensors_of(whole), tensors_of(rest)) == []
        assert first.fixed.bit_widths == second.fixed.bit_widths
        with pytest.raises(UsageError, match=r"budget differs: saved 'bops: 3 %.*given 'bops: 4 %"):
            transformers_run(majority, tmp_path, QuantizationCallback(), "4%", half)
        absent = QuantizationCallback(resume_from=tmp_path / "missing")
        with pytest.raises(UsageError, match=r"resumed at step 6, and '.*missing.cgmq_fx\.ckpt'"):
            transformers_run(majority, tmp_path, absent, checkpoint=half)


@pytest.mark.parametrize("library", ["lightning", "transformers"])
def test_a_library_that_is_not_installed_is_named_with_its_extra(library, monkeypatch):
    name = f"cgmq_fx.integrations.{library}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UsageError, match=rf"'{library}'; install it with pip install 'cgmq-fx\["):
        importlib.import_module(name)
