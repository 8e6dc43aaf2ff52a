"""The study of the method: what is trained, scored and compared, and the tables and plots of it."""
