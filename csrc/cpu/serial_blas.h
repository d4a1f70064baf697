// Limits MKL to one thread within this thread, because its results depend on the number of threads.
#pragma once

namespace lora {

class SerialBlas {
 public:
  SerialBlas();
  ~SerialBlas();
  SerialBlas(const SerialBlas&) = delete;
  SerialBlas& operator=(const SerialBlas&) = delete;

 private:
  int before_;
};

}  // namespace lora
