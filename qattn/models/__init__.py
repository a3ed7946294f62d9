"""Whole models on qattn's layers: decoder, tokenizer, chat template, sampling.

>>> from qattn.models import Model
>>> model = Model.from_gguf("model.gguf")                                  # doctest: +SKIP
>>> print("".join(model.generate("Once upon a time", max_tokens=50)))      # doctest: +SKIP

Needs the extra ``models``: ``pip install "qattn[models]"``.
"""

from qattn.models.chat import ChatTemplate as ChatTemplate
from qattn.models.chat import TemplateError as TemplateError
from qattn.models.config import ModelConfig as ModelConfig
from qattn.models.decoder import Decoder as Decoder
from qattn.models.fetch import FetchError as FetchError
from qattn.models.fetch import fetch as fetch
from qattn.models.model import Generation as Generation
from qattn.models.model import Model as Model
from qattn.models.sampling import Sampler as Sampler
from qattn.models.tokenizer import TextStream as TextStream
from qattn.models.tokenizer import Tokenizer as Tokenizer
