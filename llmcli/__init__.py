"""llmcli: from plain text to a language model that runs offline on a laptop.

Invariant: importing the package imports nothing; each public name is imported when it is first used.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from llmcli.config import AnswerConfig as AnswerConfig
    from llmcli.config import AnswerTuneConfig as AnswerTuneConfig
    from llmcli.config import BenchConfig as BenchConfig
    from llmcli.config import ChatConfig as ChatConfig
    from llmcli.config import ClassifyConfig as ClassifyConfig
    from llmcli.config import ClassifyTuneConfig as ClassifyTuneConfig
    from llmcli.config import CompleteConfig as CompleteConfig
    from llmcli.config import ConstraintConfig as ConstraintConfig
    from llmcli.config import ConvertConfig as ConvertConfig
    from llmcli.config import CorpusConfig as CorpusConfig
    from llmcli.config import EmbedConfig as EmbedConfig
    from llmcli.config import EmbedTuneConfig as EmbedTuneConfig
    from llmcli.config import EvaluateConfig as EvaluateConfig
    from llmcli.config import ExportConfig as ExportConfig
    from llmcli.config import FinetuneConfig as FinetuneConfig
    from llmcli.config import GenerateConfig as GenerateConfig
    from llmcli.config import IndexConfig as IndexConfig
    from llmcli.config import LabelledConfig as LabelledConfig
    from llmcli.config import LoraConfig as LoraConfig
    from llmcli.config import ObjectiveConfig as ObjectiveConfig
    from llmcli.config import PreferTuneConfig as PreferTuneConfig
    from llmcli.config import PretrainConfig as PretrainConfig
    from llmcli.config import SamplingConfig as SamplingConfig
    from llmcli.config import SearchConfig as SearchConfig
    from llmcli.config import SpeculationConfig as SpeculationConfig
    from llmcli.config import SummarizeConfig as SummarizeConfig
    from llmcli.config import SweepConfig as SweepConfig
    from llmcli.config import TextConfig as TextConfig
    from llmcli.config import TokenizerConfig as TokenizerConfig
    from llmcli.data.corpus import open_corpus as open_corpus
    from llmcli.data.tokenizer import load_tokenizer as load_tokenizer
    from llmcli.errors import LlmcliError as LlmcliError
    from llmcli.files.artefacts import AdaptedModel as AdaptedModel
    from llmcli.models.folder import load_model as load_model
    from llmcli.operations.answer import answer as answer
    from llmcli.operations.bench import bench as bench
    from llmcli.operations.chat import open_chat as open_chat
    from llmcli.operations.check_data import check_data as check_data
    from llmcli.operations.check_labelled import check_labelled as check_labelled
    from llmcli.operations.classify import classify as classify
    from llmcli.operations.complete import complete as complete
    from llmcli.operations.convert import convert as convert
    from llmcli.operations.embed import embed as embed
    from llmcli.operations.embed_file import embed_file as embed_file
    from llmcli.operations.evaluate import evaluate as evaluate
    from llmcli.operations.export import export as export
    from llmcli.operations.fill_mask import fill_mask as fill_mask
    from llmcli.operations.find_rate import find_rate as find_rate
    from llmcli.operations.finetune import finetune as finetune
    from llmcli.operations.finetune import plan_finetuning as plan_finetuning
    from llmcli.operations.generate import generate as generate
    from llmcli.operations.generate import open_generator as open_generator
    from llmcli.operations.generate_file import generate_file as generate_file
    from llmcli.operations.inspect import describe as describe
    from llmcli.operations.merge import merge as merge
    from llmcli.operations.prepare import prepare as prepare
    from llmcli.operations.pretrain import plan_pretraining as plan_pretraining
    from llmcli.operations.pretrain import pretrain as pretrain
    from llmcli.operations.quickstart import quickstart as quickstart
    from llmcli.operations.similar import Searcher as Searcher
    from llmcli.operations.similar import index_files as index_files
    from llmcli.operations.summarize import summarize as summarize
    from llmcli.operations.sweep import sweep as sweep
    from llmcli.operations.tokenizer import tokenizer_info as tokenizer_info
    from llmcli.operations.tokenizer import train_tokenizer as train_tokenizer
    from llmcli.operations.verify import verify as verify

# Where each public name lives.
_HOMES = {
    "config": (
        *("BenchConfig", "ChatConfig", "CompleteConfig", "ConstraintConfig", "ConvertConfig", "CorpusConfig"),
        *("EvaluateConfig", "ExportConfig", "GenerateConfig", "LabelledConfig", "PretrainConfig", "SamplingConfig"),
        *("ClassifyConfig", "ClassifyTuneConfig", "FinetuneConfig", "LoraConfig", "SpeculationConfig", "TextConfig"),
        *("EmbedConfig", "IndexConfig", "ObjectiveConfig", "SearchConfig"),
        *("AnswerConfig", "PreferTuneConfig", "SummarizeConfig", "SweepConfig", "TokenizerConfig"),
        *("AnswerTuneConfig", "EmbedTuneConfig"),
    ),
    "errors": ("LlmcliError",),
    "files.artefacts": ("AdaptedModel",),
    "data.corpus": ("open_corpus",),
    "data.tokenizer": ("load_tokenizer",),
    "models.folder": ("load_model",),
    "operations.answer": ("answer",),
    "operations.bench": ("bench",),
    "operations.chat": ("open_chat",),
    "operations.check_data": ("check_data",),
    "operations.check_labelled": ("check_labelled",),
    "operations.classify": ("classify",),
    "operations.complete": ("complete",),
    "operations.convert": ("convert",),
    "operations.embed": ("embed",),
    "operations.embed_file": ("embed_file",),
    "operations.evaluate": ("evaluate",),
    "operations.export": ("export",),
    "operations.find_rate": ("find_rate",),
    "operations.fill_mask": ("fill_mask",),
    "operations.finetune": ("finetune", "plan_finetuning"),
    "operations.generate": ("generate", "open_generator"),
    "operations.generate_file": ("generate_file",),
    "operations.inspect": ("describe",),
    "operations.merge": ("merge",),
    "operations.prepare": ("prepare",),
    "operations.pretrain": ("plan_pretraining", "pretrain"),
    "operations.quickstart": ("quickstart",),
    "operations.similar": ("Searcher", "index_files"),
    "operations.summarize": ("summarize",),
    "operations.sweep": ("sweep",),
    "operations.tokenizer": ("tokenizer_info", "train_tokenizer"),
    "operations.verify": ("verify",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_OF)]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'llmcli' has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f"llmcli.{_HOME_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
