"""After the search: finalists on val, the winner confirmed.

finalists      score the finalists on val
confirm        train the best again from new seeds
confirm_table  results of confirming runs and their verdict
bootstrap      intervals by resampling people and seeds
"""
