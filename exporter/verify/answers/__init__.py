"""An artifact that answers: its runtime tokenizes, renders, goes on and stops as the model that was trained would."""
