"""How good and how fast a sparse generation is, as numbers and as a page."""

from openvsa.evaluate.comparison import Comparison, Figures, LayerFigures, PassTime, Settings
from openvsa.evaluate.files import check_output_folder
from openvsa.evaluate.quality import Quality, compare_clips
from openvsa.evaluate.recorder import AttentionRecord, AttentionRecorder
from openvsa.evaluate.report import write_report
from openvsa.evaluate.video import read_video, write_video

__all__ = [
    "AttentionRecord",
    "AttentionRecorder",
    "Comparison",
    "Figures",
    "LayerFigures",
    "PassTime",
    "Quality",
    "Settings",
    "check_output_folder",
    "compare_clips",
    "read_video",
    "write_report",
    "write_video",
]
