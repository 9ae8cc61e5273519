# The face of the room: what other rooms may import. Each name is loaded when it is first used.
from .cards import answer_card as answer_card
from .cards import certificate_of as certificate_of
from .cards import tailored_card as tailored_card
from .cards import without_folders as without_folders
from .index import write_index as write_index
from .inputs import ReportInputs as ReportInputs
from .inputs import run_results as run_results
from .pages import write_label_page as write_label_page
from .parts import points_lost as points_lost
from .run import write_report as write_report
from .smallest import verdict as verdict
from .smallest import write_smallest as write_smallest
from .sweep import write_sweep as write_sweep
from .tables import stored_table as stored_table
from .text import verdict_line as verdict_line
