"""Gates from inside other libraries: one module for each library, which it imports."""
