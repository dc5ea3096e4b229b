"""What a task adds to the loop: its model, loss, batches and evaluators."""
