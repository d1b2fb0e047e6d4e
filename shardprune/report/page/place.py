"""The report of an output: its place, and leaving it at the end of a run.

What draws the page, and plotly with it, is imported when a page is written: half a second that a run without a report
does not spend, and none spends before its work.
"""

from shardprune.errors import first_line, without_credentials
from shardprune.extras import check_extra
from shardprune.report.progress import Reporter
from shardprune.storage.folder import output_folder
from shardprune.storage.locations import absolute

FILE = "report.html"


def leave_report(out: str, reporter: Reporter, new: bool = False) -> None:
    """Write the report of an output at the end of a run, if it is missing or out of date.

    The model is complete at this point: if the report cannot be written, say why and do not fail the run.

    Args:
        new: something was measured that leaves no events.
    """
    try:
        folder = output_folder(absolute(out))
        if new or reporter.events.recorded_any or not folder.is_file(FILE):
            check_extra("report", "report")
            from shardprune.report.page.write import write_page

            write_page(folder.url)
    except Exception as error:
        place = without_credentials(out)
        reporter.say(f"no report was written: {first_line(error)}; `shardprune report {place}` tries again")


def report_of(out: str) -> str | None:
    """Return the location of an output's report, if it has one."""
    return place_of_report(out) if output_folder(absolute(out)).is_file(FILE) else None


def place_of_report(out: str) -> str:
    """Return the location where an output's report is written, for messages."""
    return f"{without_credentials(absolute(out)).rstrip('/')}/{FILE}"
