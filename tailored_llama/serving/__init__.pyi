# The face of the room: what other rooms may import. Each name is loaded when it is first used.
from .chat import how_to_ask as how_to_ask
from .chat import write_chat_template as write_chat_template
from .chat import write_schema as write_schema
from .export import copy_source as copy_source
from .export import export_gguf as export_gguf
from .export import score_quantised as score_quantised
from .gguf import write_gguf as write_gguf
from .gguf import write_gguf_adapter as write_gguf_adapter
from .gguf_writing import gguf_file as gguf_file
from .llama_cpp import measure_speed as measure_speed
from .llama_cpp import read_speed as read_speed
from .settings import GgufSettings as GgufSettings
from .settings import QuantisedSettings as QuantisedSettings
from .settings import SourceSettings as SourceSettings
from .settings import bits_of as bits_of
from .trim import trim_checkpoint as trim_checkpoint
from .trim import trim_gguf as trim_gguf
