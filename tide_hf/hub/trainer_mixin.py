"""The Hub side of a trainer: it writes its model card, pushes whole states, and resumes from a repository."""

from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import logging

from .card import write_card
from .curves import CURVES_FILE, plot_curves
from .front_matter import as_list
from .pushing import LAST_CHECKPOINT, STAGING, Pusher, PushError, State, fetch_training_state, has_remote_code, stage
from .record import RunFacts, RunRecord, record_run, update_record
from .sources import find_source, is_hub_name

logger = logging.get_logger(__name__)


class HubTrainerMixin:
    """Writes a model card at every save, pushes each state in one commit, and reports every push that fails.

    A trainer lists it before `transformers.Trainer` among its bases, and defines `_run_facts`.

    Attributes:
        run_record ([`~tide_hf.hub.RunRecord`]): what the card says; add results, decoding speeds and data to it.
    """

    _saved_with_code = False  # whether the model that this process saved last carries its modeling files

    @cached_property
    def run_record(self) -> RunRecord:
        return record_run(self._run_facts())

    def _run_facts(self) -> RunFacts:
        """What the card says of the run, as it stands now."""
        raise NotImplementedError

    # -- the card -----------------------------------------------------------------------------------------------------

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Writes README.md and the training curves into the output folder; keeps what people wrote into the card.

        What is given once is also used by the cards that are written later.

        Args:
            language, license, model_name: as in [`~transformers.Trainer.create_model_card`].
            tags, tasks: added to the tags of the card.
            finetuned_from (`str`, *optional*): name of the model that the student was initialised from.
            dataset_tags, dataset: Hub names or paths of the training data; the first one given counts.
            dataset_args: shown among the training arguments.
        """
        if not self.is_world_process_zero():
            return
        record, args, folder = self.run_record, self.args, Path(self.args.output_dir)
        if language:
            record.languages = as_list(language)
        if license:
            record.license = {"license": license}
        record.tags = list(dict.fromkeys([*record.tags, *as_list(tags), *as_list(tasks)]))
        if finetuned_from:
            record.start = find_source(finetuned_from, token=args.hub_token)
        if dataset_tags or dataset:
            self.set_data_sources(as_list(dataset_tags or dataset))
        if dataset_args:
            record.arguments["dataset_args"] = ", ".join(as_list(dataset_args))
        record.location = self.hub_model_id or "."
        record.model_name = (
            model_name or record.model_name or (self.hub_model_id or folder.resolve().name).split("/")[-1]
        )
        record.revision = _branch(args.hub_revision)
        update_record(record, self._run_facts())
        folder.mkdir(parents=True, exist_ok=True)
        card = folder / "README.md"
        existing = card.read_text(encoding="utf-8") if card.is_file() else ""
        has_curves = plot_curves(record.log_history, folder / CURVES_FILE)
        card.write_text(write_card(record, existing, self._saved_with_code, has_curves), encoding="utf-8")

    def set_data_sources(self, names: list[str]) -> None:
        """Names the training data for the card.

        Args:
            names (`list[str]`): Hub names or paths.
        """
        self.run_record.datasets = [find_source(name, is_dataset=True, token=self.args.hub_token) for name in names]

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        card = Path(self.args.output_dir) / "README.md"
        before = card.read_text(encoding="utf-8") if card.is_file() else None
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            if before is not None:  # PEFT overwrites our card with a stock one, or adds to it
                card.write_text(before, encoding="utf-8")
            self._saved_with_code = has_remote_code(output_dir or self.args.output_dir)
            self.create_model_card()

    # -- pushing ------------------------------------------------------------------------------------------------------

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Creates the repository, and the branch that the run pushes to.

        Args:
            token, private: as in [`~transformers.Trainer.init_hf_repo`].
        """
        super().init_hf_repo(token=token, private=private)
        if self.is_world_process_zero():
            branch = _branch(self.args.hub_revision)
            token = token or self.args.hub_token
            if branch is not None:
                HfApi(token=token).create_branch(self.hub_model_id, branch=branch, exist_ok=True)
            self._pusher = Pusher(self.hub_model_id, self.args.hub_revision, token, self.args.hub_always_push)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Queues a whole state: model, code, tokenizer, card and, if the strategy asks for it, the training state."""
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.create_model_card()
        checkpoint = Path(checkpoint_folder)
        names = {HubStrategy.CHECKPOINT: LAST_CHECKPOINT, HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
        with_state = checkpoint if strategy in names else None
        target = Path(self.args.output_dir) / STAGING / checkpoint.name
        folder = stage(target, [*checkpoint.iterdir(), *self._card_files()], with_state, names.get(strategy, ""))
        progress = f"step {self.state.global_step}"
        if self.args.save_strategy == SaveStrategy.EPOCH:
            progress = f"epoch {int(self.state.epoch)}"
        self._pusher.submit(State(folder, f"Training in progress, {progress}", given=self.run_record.given))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        create_pr: bool = False,
        **kwargs,
    ):
        """Saves the model and its card, and pushes them in one commit.

        Args:
            commit_message, blocking, token, revision, private: as in [`~transformers.Trainer.push_to_hub`].
            create_pr (`bool`): open a pull request instead of committing to the branch.
            kwargs: arguments of [`create_model_card`].

        Returns:
            `CommitInfo`, or a `Future` of it unless `blocking`; None on all processes but the first.

        Raises:
            PushError: if the push failed after several attempts. The model and its card are complete on disk.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        kwargs["tags"] = [*as_list(kwargs.get("tags")), *(getattr(self.model, "model_tags", None) or [])]
        self.create_model_card(**kwargs)
        self._pusher.wait()
        output_dir = Path(self.args.output_dir)
        folder = stage(output_dir / STAGING / "final", [*output_dir.iterdir()])
        state = State(folder, commit_message, create_pr, self.run_record.given)
        pusher = self._pusher
        if revision is not None or token is not None:
            pusher = Pusher(self.hub_model_id, revision or pusher.revision, token or pusher.token, True)

        def push():
            try:
                return pusher.push(state)
            except Exception as error:
                raise self._push_error(error) from error

        return push() if blocking else _in_background(push)

    def _card_files(self) -> list[Path]:
        folder = Path(self.args.output_dir)
        return [path for path in (folder / "README.md", folder / CURVES_FILE) if path.is_file()]

    def _finish_current_push(self) -> None:
        if getattr(self, "_pusher", None) is not None:
            self._pusher.wait()

    def _push_error(self, error: Exception | None) -> PushError:
        folder = self.args.output_dir
        return PushError(
            f"The last state of this run is not on the Hub ({self.hub_model_id}): {error}\nIt is whole in {folder}: "
            f"push it once the Hub can be reached: hf upload {self.hub_model_id} {folder} . --exclude "
            f"'checkpoint-*/*' '{STAGING}/*' training_args.bin"
        )

    # -- training -----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As [`~transformers.Trainer.train`], but can also resume from a repository that a run pushed to.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): the folder of a checkpoint, True for the last one in
                the output folder, or `user/name` or `user/name@revision` for the last training state on the Hub.
            args, kwargs: further arguments of [`~transformers.Trainer.train`].

        Raises:
            PushError: if states were pushed during training and the last one did not arrive. The model is saved.
        """
        name = resume_from_checkpoint.split("@")[0] if isinstance(resume_from_checkpoint, str) else ""
        if "/" in name and not Path(resume_from_checkpoint).exists() and is_hub_name(name):
            with self.args.main_process_first(desc="fetching the last training state"):
                resume_from_checkpoint = fetch_training_state(
                    resume_from_checkpoint, _branch(self.args.hub_revision), self.args.hub_token
                )
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        self._require_pushed()
        return output

    def _require_pushed(self) -> None:
        """Tries once more to push what did not arrive; raises on all processes if that fails too."""
        error = None
        pusher = getattr(self, "_pusher", None)
        if pusher is not None and pusher.failed is not None:
            try:
                pusher.push(pusher.failed)
            except Exception as last:
                error = last
        if not self.args.push_to_hub or self.args.hub_strategy == HubStrategy.END:
            return
        if broadcast_object_list([error is not None])[0]:
            self.save_model(_internal_call=True)
            raise self._push_error(error) from error


def _branch(revision: str | None) -> str | None:
    """The revision if it names a branch: it is neither unset nor a pull request."""
    return None if revision is None or revision.startswith("refs/") else revision


def _in_background(function) -> Future:
    pool = ThreadPoolExecutor(1)
    future = pool.submit(function)
    pool.shutdown(wait=False)
    return future
