"""Results as people read them: one HTML file, and a picture of accuracy against cost.

`shown` picks sample images and captions and reads their pixels (`pictures`); `curve` and `svg`
draw what `eval.results` reads from a harness's JSON, on scales of `axes`; `html` puts the page
together from `page.html` and `style.css`.
"""

from eval.report.curve import draw_curve
from eval.report.html import write_report
from eval.report.shown import Shown, show_retrieval, show_zeroshot

__all__ = ["Shown", "draw_curve", "show_retrieval", "show_zeroshot", "write_report"]
