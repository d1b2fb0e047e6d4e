"""lm-eval's interface to a model on shards; texts become queries as in lm-eval's own Hugging Face model."""

import weakref
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import DEFAULT_MAX_LENGTH, has_bos_prefix, resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from shardprune.cluster.backends import backend_of
from shardprune.cluster.group import Backend
from shardprune.cluster.likelihoods import Query
from shardprune.errors import InputError
from shardprune.evaluation.sharded import ShardedModel
from shardprune.model.tokenizer import check_ends
from shardprune.recipes.evaluate import ShardFields
from shardprune.report.progress import Reporter
from shardprune.storage.tokenising import check_vocabulary

Request = tuple[
    tuple[str, str] | None, list[int], list[int]
]  # (context, continuation) as texts, and the tokens of each


class ShardedLM(TemplateLM):
    """An lm-eval model that computes log-likelihoods over shards. It does not generate text.

    Args:
        max_length: longest sequence in tokens (default: lm-eval's reading of the config).
    """

    def __init__(self, model: ShardedModel, max_length: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.tokenizer: Any = model.checkpoint.tokenizer()
        config = model.skeleton.config
        self.max_length: int = max_length or resolve_max_length(config, self.tokenizer, default=DEFAULT_MAX_LENGTH)
        check_ends(self.tokenizer, "model")

    # -- tokens -----------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokenise a text. By default, add the tokenizer's special tokens unless the text starts with them.

        Raises:
            InputError: the model has no embedding for a token.
        """
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        tokens = self.tokenizer.encode(string, verbose=False, **special)
        check_vocabulary(max(tokens, default=0), self.model.skeleton.config.vocab_size, "model", "a task's text")
        return tokens

    # -- what tasks ask for -----------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return, for each continuation given its context, its log-likelihood and whether greedy decoding would produce
        it.
        """
        return super().loglikelihood(requests, disable_tqdm=True)  # shards report progress themselves

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of each text, over windows whose predicted tokens do not overlap; each token is
        given at most `max_length` preceding ones.
        """
        windows: list[Request] = []
        ends = []
        for text in (request.args[0] for request in requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(None, *make_disjoint_window(window)) for window in rolling]
            ends.append(len(windows))
        scores = [score for score, _ in self._loglikelihood_tokens(windows)]
        totals = [sum(scores[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (request.args[0],), total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Refuse to generate text.

        Raises:
            InputError: always.
        """
        name = requests[0].task_name
        raise InputError("tasks", f"{name!r} lets the model write text, which shards do not do; use --engine hf")

    def _loglikelihood_tokens(self, requests: Sequence[Request], **kwargs: Any) -> list[tuple[float, bool]]:
        """Compute log-likelihoods; requests that share all but their continuation's last token pass through the model
        once.
        """
        asked: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
        keys = []
        for _, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise InputError(
                    "tasks", f"a continuation has {len(continuation)} tokens; the model takes 1 to {self.max_length}"
                )
            # Contexts that are too long are truncated on the left.
            tokens = tuple((context + continuation)[-(self.max_length + 1) : -1])
            keys.append((tokens, tuple(continuation)))
            asked.setdefault(tokens, {})[tuple(continuation)] = None
        queries = [Query(tokens, tuple(continuations)) for tokens, continuations in asked.items()]
        values = self.model.log_likelihoods(queries, self.max_length) if queries else []
        answers = {
            (query.tokens, continuation): answer
            for query, found in zip(queries, values, strict=True)
            for continuation, answer in zip(query.continuations, found, strict=True)
        }
        for (texts, _, _), key in zip(requests, keys, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answers[key])
        return [answers[key] for key in keys]

    # -- chat templates ---------------------------------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Format a dialogue as one text."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )


@register_model("shardprune")
class ShardpruneLM(ShardedLM):
    """The model `shardprune` of lm-eval's command and functions, which starts its own workers from model arguments.

    Args:
        pretrained: the checkpoint, as MODEL of `shardprune evaluate`.
        batch_size: texts of a wave; 1 and `auto` select shardprune's default.
        device: `cpu`, or any other value for auto.
        settings: the fields under "Workers" in `shardprune evaluate --help`.

    Raises:
        InputError: no checkpoint is named, or a field is wrong.
    """

    def __init__(
        self,
        pretrained: str = "",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_length: int | None = None,
        **settings: Any,
    ) -> None:
        if not pretrained:
            raise InputError("pretrained", "missing; name a checkpoint, as pretrained=MODEL")
        if str(batch_size).isdigit() and int(str(batch_size)) > 1:
            settings.setdefault("wave", int(str(batch_size)))
        if device == "cpu":  # the command's default is cuda:0, even without a GPU
            settings.setdefault("device", "cpu")
        shards = ShardFields.checked(settings)
        backend = backend_of(shards)
        model = ShardedModel(pretrained, shards, backend, Reporter())
        super().__init__(model, max_length)
        weakref.finalize(self, _close, model, backend)  # lm-eval has no hook for the end of its use


def _close(model: ShardedModel, backend: Backend) -> None:
    model.close()
    backend.close()
