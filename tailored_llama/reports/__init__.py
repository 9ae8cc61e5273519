"""From numbers to pages: reports, model cards and the tables of a terminal."""

from tailored_llama.reports import prompt_study, run, sweep, transfer
from tailored_llama.reports.inputs import Cost, ModelResults, QuantisedScores, ReportInputs, RunResults
from tailored_llama.reports.model_card import tailored_card
from tailored_llama.reports.profile import profile_table
from tailored_llama.reports.prompt_study import study_settings, study_table
from tailored_llama.reports.recovery import recovery_table
from tailored_llama.reports.run import write_report
from tailored_llama.reports.sweep import sweep_table
from tailored_llama.reports.text import verdict_line
from tailored_llama.reports.transfer import transfer_table

__all__ = [
    "Cost", "ModelResults", "QuantisedScores", "ReportInputs", "RunResults", "profile_table", "prompt_study",
    "recovery_table", "run", "study_settings", "study_table", "sweep", "sweep_table", "tailored_card", "transfer",
    "transfer_table", "verdict_line", "write_report",
]  # fmt: skip
