"""What distckpt relies on in transformers beyond its callbacks. A failure here names what a new release has moved."""

import inspect
import re

import pytest

transformers = pytest.importorskip("transformers", reason="not in this environment")

STATEMENTS = {
    "train": (
        "self._load_from_checkpoint(resume_from_checkpoint)",
        "state = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME))",
        "find_executable_batch_size( self._inner_training_loop, ",
    ),
    "_inner_training_loop": (
        "self._init_training_state(",
        "self._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)",
        "model.zero_grad() self.control = self.callback_handler.on_train_begin(args, self.state, self.control)",
        "for epoch in range(epochs_trained, num_train_epochs):",
        "self.control = self.callback_handler.on_epoch_begin(self.args, self.state, self.control) self._run_epoch(",
        "if self.control.should_training_stop: break",
    ),
    "_init_training_state": (
        "epochs_trained = int(self.state.global_step // num_update_steps_per_epoch)",
        "steps_trained_in_current_epoch = self.state.global_step % num_update_steps_per_epoch",
    ),
    "_run_epoch": (
        "train_dataloader = skip_first_batches(train_dataloader, steps_trained_in_current_epoch)",
        "epoch_iterator = iter(train_dataloader)",
        "self.get_batch_samples(epoch_iterator, num_batches, self.args.device)",
        "self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)",
        "tr_loss_step = self.training_step(model, inputs, num_items_in_batch)",
        "self.state.global_step += 1",
        "self._maybe_log_save_evaluate(",
        "if self.control.should_epoch_stop or self.control.should_training_stop: break",
        "self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)",
        "self._maybe_log_save_evaluate(",
    ),
    "_save_checkpoint": ("self.store_flos()", "cb_state = cb.state()"),
}


@pytest.mark.parametrize("method", STATEMENTS)
def test_the_trainers_source_has_the_statements_that_are_relied_on_in_their_order(method: str) -> None:
    source = inspect.getsource(getattr(transformers.Trainer, method))
    source = re.sub(r"\s+", " ", re.sub(r"#.*", "", source))
    at = 0
    for statement in STATEMENTS[method]:
        found = source.find(statement, at)
        assert found >= 0, f"Trainer.{method} has no longer, at its place: {statement}"
        at = found + len(statement)


def test_the_numbers_of_steps_come_in_the_order_that_is_relied_on() -> None:
    source = inspect.getsource(transformers.Trainer.set_initial_training_values)
    assert re.search(r"return \(\s+num_train_epochs,\s+num_update_steps_per_epoch,", source)
