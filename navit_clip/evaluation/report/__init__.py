"""Results as people read them: one HTML file, and a picture of accuracy against cost.

`shown` picks sample images and captions and reads their pixels (`pictures`); `curve` and `svg` draw
what `navit_clip.evaluation.results` reads from a harness's JSON, on scales of `axes`; `html` puts
the page together from `page.html` and `style.css`.
"""

from navit_clip.evaluation.report.curve import draw_curve
from navit_clip.evaluation.report.html import write_report
from navit_clip.evaluation.report.samples import Shown, show_retrieval, show_zeroshot

__all__ = ["Shown", "draw_curve", "show_retrieval", "show_zeroshot", "write_report"]
