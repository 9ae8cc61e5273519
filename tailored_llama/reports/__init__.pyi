# The face of the room: what other rooms may import. Each name is loaded when it is first used.
from .inputs import Cost as Cost
from .inputs import ModelResults as ModelResults
from .inputs import QuantisedScores as QuantisedScores
from .inputs import ReportInputs as ReportInputs
from .inputs import RunResults as RunResults
from .model_card import tailored_card as tailored_card
from .profile import profile_table as profile_table
from .prompt_study import study_settings as study_settings
from .prompt_study import study_table as study_table
from .prompt_study import write_study as write_study
from .recovery import recovery_table as recovery_table
from .run import write_report as write_report
from .sweep import sweep_table as sweep_table
from .sweep import write_sweep as write_sweep
from .text import verdict_line as verdict_line
from .transfer import transfer_table as transfer_table
from .transfer import write_transfer as write_transfer
