"""Results as pages: tables beside the paper's and pictures, from results.jsonl alone; nothing here needs torch."""

from restuning.paper.report.page import write as write
