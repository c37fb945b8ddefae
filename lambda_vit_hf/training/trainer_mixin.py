"""What a Trainer of a LambdaViT does beyond transformers' own, where callbacks cannot reach."""

import shutil
from functools import partial
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, Trainer
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils.hub import PushInProgress

from ..hub.push import PUSHED_FILES, is_for_the_hub, upload_files
from ..models.checksums import check_checksums, remove_checksums, write_checksums
from ..models.finite import check_finite
from .background_checksums import BackgroundChecksums
from .callback import EntropyGuidedRemovalCallback
from .checkpoints import RESUMED_FILES, find_resumable_checkpoint
from .ema import EmaCallback
from .hub_token import keep_token_unwritten


class LambdaViTTrainerMixin:
    """
    Put it before a Trainer's class. [`LambdaViTTrainer`] is transformers' Trainer with it.

    Differences from `Trainer`:

    - The model card says what [`EntropyGuidedRemovalCallback`] removed, in place of the generic one; a README.md of
      the user is added to.
    - The average of [`EmaCallback`], and the random state of every process, are in a checkpoint before
      `trainer_state.json` makes it whole.
    - Checkpoints and saved models get a `SHA256SUMS`, and what is loaded from is checked against it.
      `resume_from_checkpoint=True` takes the newest checkpoint that is whole. A model with NaN or infinity in its
      weights or logits is not saved as finished.
    - To the Hub goes what serves the model, and nothing else of the output folder. `hub_token` is never written to
      `training_args.bin`.
    - After removal it can train on, in several processes too.

    Example:

    ```python
    >>> from transformers import Trainer
    >>> from lambda_vit_hf import LambdaViTTrainerMixin

    >>> class MyTrainer(LambdaViTTrainerMixin, Trainer):
    ...     pass
    ```
    """

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        if resume_from_checkpoint is True:
            found = find_resumable_checkpoint(self.args.output_dir)
            if found is None:
                raise ValueError(f"No valid checkpoint found in {self.args.output_dir}: there is nothing to resume.")
            resume_from_checkpoint = str(found)
        before = sum(1 for _ in self.model.parameters())
        if self.args.should_save:
            remove_checksums(self.args.output_dir)  # of a model that was finished here before
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._checksums().wait()
        is_smaller = sum(1 for _ in self.model.parameters()) < before
        if is_smaller and isinstance(self.model_wrapped, DistributedDataParallel):
            self.model_wrapped = self.model  # DDP would wait for gradients of parameters that are gone
        return output

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        check_checksums(resume_from_checkpoint)
        stored = AutoConfig.from_pretrained(resume_from_checkpoint)
        mine, theirs = self.model.config.removed_layers, stored.removed_layers
        if mine != theirs:  # transformers would load what fits, and warn
            raise ValueError(
                f"{resume_from_checkpoint} has no attention in layers {theirs}, this model has none in {mine}: load"
                " the model from the checkpoint, then resume."
            )
        if mine and self.model.config.fade_to != stored.fade_to:
            raise ValueError(
                f"In {resume_from_checkpoint} the place of attention has {stored.fade_to!r}, in this model"
                f" {self.model.config.fade_to!r}: load the model from the checkpoint, then resume."
            )
        for name in ("token_merging_r", "token_merging_start", "drop_path_rate", "drop_path_schedule"):
            now, then = (getattr(config, name, None) for config in (self.model.config, stored))
            if now != then:
                raise ValueError(
                    f"{resume_from_checkpoint} was trained with {name} = {then}, this model has {now}: resume with the"
                    " same, or load the model from the checkpoint."
                )
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        self._checksums().wait()
        check_checksums(self.state.best_model_checkpoint)
        super()._load_best_model()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        is_checkpoint = _internal_call and output_dir is not None and self.is_in_train  # and not whole yet
        if not is_checkpoint and self.args.should_save:
            check_finite(self.accelerator.unwrap_model(self.model), "the trained model")
        super().save_model(output_dir, _internal_call)
        if not self.args.should_save:
            return
        if not is_checkpoint:
            write_checksums(output_dir or self.args.output_dir)
            return
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EmaCallback):
                callback.write_average(Path(output_dir), self.state.global_step)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the main process makes the checkpoint whole next

    def _save_checkpoint(self, model, trial) -> None:
        self._checksums().wait()
        super()._save_checkpoint(model, trial)
        if self.args.should_save and self._removal() is None:  # which has a note to write first
            self._checksums().start(Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}"))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        keep_token_unwritten(self.args)
        super()._save(output_dir, state_dict)

    def create_model_card(
        self, language=None, license=None, tags=None, model_name=None, finetuned_from=None, tasks=None,
        dataset_tags=None, dataset=None, dataset_args=None,
    ) -> None:  # fmt: skip
        """Facts as [`Trainer.create_model_card`] takes them; for our card `tasks` and `dataset_args` are not used."""
        removal = self._removal()
        if removal is None or removal.selection is None:
            super().create_model_card(
                language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args
            )
            return
        facts = {
            "name": model_name, "language": language, "license": license, "base_model": finetuned_from,
            "tags": [tags] if isinstance(tags, str) else tags, "dataset": dataset_tags or dataset,
            "repo_id": self.hub_model_id,
        }  # fmt: skip
        known = {name: value for name, value in facts.items() if value}
        removal.write_card(self.args, self.state, self.model, **known)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> CommitInfo | None:
        """As [`Trainer.push_to_hub`], but of the output folder only the files of `PUSHED_FILES`."""
        self._begin_push()
        name = kwargs.pop("model_name", None) or self.args.hub_model_id or Path(self.args.output_dir).resolve().name
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(model_name=name.split("/")[-1], **kwargs)
        self._finish_current_push()
        return self._upload(commit_message, token, revision, run_as_future=not blocking)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        args, running = self.args, self.push_in_progress is not None and not self.push_in_progress.is_done()
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if running and not args.hub_always_push:
            return
        self._begin_push()
        for path in Path(checkpoint_folder).iterdir():
            if is_for_the_hub(path.name) and path.name != "README.md":
                shutil.copy(path, args.output_dir)  # later checkpoints may delete this one while it is sent
        by_steps = args.save_strategy == SaveStrategy.STEPS
        when = f"step {self.state.global_step}" if by_steps else f"epoch {int(self.state.epoch)}"
        message = f"Training in progress, {when}"
        jobs = [self._upload(message, args.hub_token, None, run_as_future=True)]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = Path(checkpoint_folder).name
            jobs.append(
                HfApi().run_as_future(
                    upload_files,
                    checkpoint_folder,
                    self.hub_model_id,
                    (*PUSHED_FILES, *RESUMED_FILES),
                    path_in_repo="last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else name,
                    commit_message=f"{message}, checkpoint",
                    token=args.hub_token,
                    revision=args.hub_revision,
                )
            )
        if running:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)

    def _begin_push(self) -> None:
        removal = self._removal()
        if removal is not None:
            removal.trainer_writes_card = True
        self.callback_handler.on_push_begin(self.args, self.state, self.control)

    def _upload(self, message: str | None, token: str | None, revision: str | None, run_as_future: bool):
        upload = partial(
            upload_files,
            self.args.output_dir,
            self.hub_model_id,
            PUSHED_FILES,
            commit_message=message,
            token=token,
            revision=revision or self.args.hub_revision,
        )
        return HfApi().run_as_future(upload) if run_as_future else upload()

    def _checksums(self) -> BackgroundChecksums:
        removal = self._removal()
        return vars(self).setdefault("_own_checksums", BackgroundChecksums()) if removal is None else removal.checksums

    def _removal(self) -> EntropyGuidedRemovalCallback | None:
        callbacks = self.callback_handler.callbacks
        return next((one for one in callbacks if isinstance(one, EntropyGuidedRemovalCallback)), None)


class LambdaViTTrainer(LambdaViTTrainerMixin, Trainer):
    """transformers' [`Trainer`] with [`LambdaViTTrainerMixin`]."""
